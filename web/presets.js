// View-Consistency Sampler and Schedule show the numbers that the chosen preset sets; the others are the user's own. The
// numbers come with the node's definition.
import { app } from '../../scripts/app.js';
import { after } from './live.js';

const NODES = ['DP3D_ViewConsistencySampler', 'DP3D_ViewConsistencySchedule'];

function follow(node, { required, optional = {} }) {
  const { presets } = required.preset[1];
  const preset = node.widgets.find(({ name }) => name === 'preset');
  const names = new Set(Object.values(presets).flatMap(Object.keys)); // that some preset sets
  const numbers = node.widgets.filter(({ name }) => names.has(name));
  const own = new Map(); // the user's numbers while a preset's are shown

  function show() {
    const used = presets[preset.value] ?? {};
    for (const each of numbers) {
      const taken = each.name in used;
      if (taken && !own.has(each)) own.set(each, each.value);
      if (own.has(each)) each.value = taken ? used[each.name] : own.get(each);
      if (!taken) own.delete(each);
      each.disabled = taken;
    }
    node.setDirtyCanvas(true, true);
  }

  after(preset, 'callback', show);
  after(node, 'onConfigure', () => {
    own.clear(); // another graph's numbers; of this one, those are saved that the preset showed
    for (const each of numbers) {
      if (each.name in (presets[preset.value] ?? {})) own.set(each, (required[each.name] ?? optional[each.name])[1].default);
    }
    show();
  });
  show();
}

app.registerExtension({
  name: 'DiffPortrait3D.Presets',
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) follow(node, node.constructor.nodeData.input);
  },
});
