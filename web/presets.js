// View-Consistency Sampler and Schedule show the steps and the eta of the chosen preset; they are the user's own to set
// with preset custom only. The numbers come with the node's definition.
import { app } from '../../scripts/app.js';

const NODES = ['DP3D_ViewConsistencySampler', 'DP3D_ViewConsistencySchedule'];

function follow(node, presets) {
  const widget = (name) => node.widgets.find((each) => each.name === name);
  const [preset, ...numbers] = ['preset', 'steps', 'eta'].map(widget);
  let own = null; // the user's numbers while a preset's are shown

  function show() {
    const used = presets[preset.value];
    if (used && !own) own = numbers.map(({ value }) => value);
    if (used || own) numbers.forEach((each, i) => { each.value = (used ?? own)[i]; });
    if (!used) own = null;
    for (const each of numbers) each.disabled = Boolean(used);
    node.setDirtyCanvas(true, true);
  }

  const { callback } = preset;
  preset.callback = function (...values) {
    const result = callback?.apply(this, values);
    show();
    return result;
  };
  const { onConfigure } = node;
  node.onConfigure = function (...values) {
    const result = onConfigure?.apply(this, values);
    own = null; // another graph's numbers
    show();
    return result;
  };
  show();
}

app.registerExtension({
  name: 'DiffPortrait3D.Presets',
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    follow(node, node.constructor.nodeData.input.required.preset[1].presets);
  },
});
