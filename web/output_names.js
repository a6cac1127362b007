// Export Views and Save Cameras take %date:yyyy-MM-dd%, %node.widget% and the like in their names, as Save Image does; the
// editor replaces them for a fixed list of nodes only.
import { app } from '../../scripts/app.js';
import { applyTextReplacements } from '../../scripts/utils.js';

const NODES = ['DP3D_ExportViews', 'DP3D_SaveCameras'];

app.registerExtension({
  name: 'DiffPortrait3D.OutputNames',
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    const prefix = node.widgets.find(({ name }) => name === 'filename_prefix');
    prefix.serializeValue = () => applyTextReplacements(app, prefix.value);
  },
});
