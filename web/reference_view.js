// Reference View shows its picture at once when a number changes, as the run would show it.
import { app } from '../../scripts/app.js';
import { api } from '../../scripts/api.js';

const NODE = 'DP3D_ReferenceView';

// The file that Load Image holds behind the portrait input; null without a node there, undefined for any other node.
function portraitOf(node) {
  const source = node.getInputNode(node.findInputSlot('portrait'));
  if (!source) return null;
  const value = source.widgets?.find(({ name }) => name === 'image')?.value;
  return typeof value === 'string' ? value : undefined;
}

async function picture(node, portrait) {
  const values = Object.fromEntries(node.widgets.map(({ name, value }) => [name, value]));
  const response = await api.fetchApi('/diffportrait3d/reference_view', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...values, portrait }),
  });
  if (!response.ok) throw new Error((await response.json()).error);
  return response.blob();
}

// The way by which pictures come to a node while it is being run.
function show(node, blob) {
  const id = String(node.id);
  const ids = { nodeId: id, displayNodeId: id, parentNodeId: id, realNodeId: id };
  api.dispatchCustomEvent('b_preview_with_metadata', { blob, ...ids });
  node.setDirtyCanvas(true, true);
}

function makeLive(node) {
  let drawing = false;
  let changed = false;

  // One request at a time; what changes meanwhile is drawn afterwards, once.
  async function draw() {
    changed = true;
    if (drawing || !node.graph?.isRootGraph) return; // inside a subgraph the run shows the picture
    drawing = true;
    try {
      while (changed) {
        changed = false;
        const portrait = portraitOf(node);
        if (portrait !== undefined) show(node, await picture(node, portrait));
      }
    } catch (error) {
      console.warn(`Reference View: ${error.message}`);
    } finally {
      drawing = false;
    }
  }

  for (const widget of node.widgets ?? []) {
    const { callback } = widget;
    widget.callback = function (...values) {
      const result = callback?.apply(this, values);
      draw();
      return result;
    };
  }
}

app.registerExtension({
  name: 'DiffPortrait3D.ReferenceView',
  nodeCreated(node) {
    if (node.comfyClass === NODE) makeLive(node);
  },
});
