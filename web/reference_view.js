// Reference View shows its image as soon as it is loaded or a number changes, as the run would show it.
import { app } from '../../scripts/app.js';
import { api } from '../../scripts/api.js';
import { Requests, after, afterLinks, post } from './live.js';

const NODE = 'DP3D_ReferenceView';

// What is connected to the portrait input: the file that Load Image holds, or the folder of Load Miniature, whose own
// portrait it is; nulls without a node there, undefined for any other node and for a name that the server has not.
function portraitOf(node) {
  const source = node.getInputNode(node.findInputSlot('portrait'));
  if (!source) return { portrait: null };
  const miniature = source.comfyClass === 'DP3D_LoadMiniature';
  const { value, options } = source.widgets?.find(({ name }) => name === (miniature ? 'name' : 'image')) ?? {};
  const unknown = Array.isArray(options?.values) && !options.values.includes(value);
  if (typeof value !== 'string' || unknown) return undefined;
  return miniature ? { portrait: null, miniature: value } : { portrait: value };
}

// The way by which images come to a node during a run. Meanwhile another graph may have been opened, and a
// node of that one has the number now.
function show(node, blob) {
  if (node.graph?.getNodeById(node.id) !== node) return;
  const id = String(node.id);
  const ids = { nodeId: id, displayNodeId: id, parentNodeId: id, realNodeId: id };
  api.dispatchCustomEvent('b_preview_with_metadata', { blob, ...ids });
  node.setDirtyCanvas(true, true);
}

function makeLive(node) {
  const requests = new Requests(async () => {
    if (!node.graph?.isRootGraph) return; // inside a subgraph the run shows the image
    const portrait = portraitOf(node);
    if (portrait !== undefined) show(node, await (await post(node, 'reference_view', portrait)).blob());
  }, (error) => console.warn(`Reference View: ${error.message}`));
  afterLinks(node, () => requests.update());
  for (const widget of node.widgets ?? []) after(widget, 'callback', () => requests.update());
}

app.registerExtension({
  name: 'DiffPortrait3D.ReferenceView',
  nodeCreated(node) {
    if (node.comfyClass === NODE) makeLive(node);
  },
});
