// What tools/frontend.py asks of ComfyUI's page: its functions are called there by name.
window.diffportrait3d = (() => {
  const { app, LiteGraph } = window;
  // Room below the widgets.
  const PICTURES = {
    LoadImage: 210, SaveImage: 220, PreviewImage: 220, SaveAnimatedWEBP: 120,
    DP3D_ViewConsistencySampler: 220, DP3D_ReferenceView: 220,
  };
  const COLUMN_WIDTH = 320;
  const GAP = 30;
  const COLUMN_GAP = 100;
  const TITLE = 30; // of a node; it lies above pos
  const MARGIN = 16; // of a group around its nodes
  const HEADER = 46; // of a group

  const settled = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 300)));

  async function fit() {
    app.canvas.draw(true, true); // sizes are only known once drawn
    await settled();
    await app.extensionManager.command.execute('Comfy.Canvas.FitView');
    await settled();
  }

  // Types the editor has no node for. A note has no class on the server, but one in the editor.
  function unknown() {
    return app.graph.nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).map((node) => node.type);
  }

  async function open(workflow) {
    await app.loadGraphData(workflow, true, true, 'workflow');
    await settled();
    return unknown();
  }

  // API form and layout -> the editor's form: titled columns of nodes, a note at the left.
  async function build(prompt, layout) {
    await app.loadApiJson(prompt, 'workflow');
    await settled();
    const missing = unknown();
    if (missing.length) return missing;
    for (const node of app.graph.nodes) {
      const title = prompt[node.id]?._meta?.title;
      if (title && title !== node.constructor.title) node.title = title;
      for (const widget of node.widgets ?? []) setUnsaid(widget, node, prompt[node.id].inputs);
    }
    const note = placeNote(layout.note);
    let x = note.pos[0] + note.size[0] + COLUMN_GAP;
    for (const column of layout.columns) x = placeColumn(column, x) + COLUMN_GAP;
    await fit();
    return [];
  }

  // The editor leaves what the prompt does not say as it was in the graph before.
  function setUnsaid(widget, { constructor: { nodeData } }, said) {
    if (widget.name === 'control_after_generate') widget.value = 'fixed';
    const options = (nodeData.input.optional?.[widget.name] ?? nodeData.input.required?.[widget.name] ?? [])[1];
    if (options && !(widget.name in said)) widget.value = options.default ?? options.options?.[0] ?? widget.value;
  }

  function placeNote({ text, width, height }) {
    const note = LiteGraph.createNode('MarkdownNote');
    app.graph.add(note);
    note.title = 'About this graph';
    note.widgets[0].value = text.join('\n');
    note.pos = [0, TITLE - HEADER]; // level with the groups
    note.setSize([width, height]);
    return note;
  }

  // Puts the nodes below each other and a group around them; returns the right edge.
  function placeColumn({ title, color, nodes: ids, width = COLUMN_WIDTH }, x) {
    const nodes = ids.map((id) => app.graph.getNodeById(Number(id)));
    let y = TITLE;
    for (const node of nodes) {
      const height = node.computeSize()[1] + (PICTURES[node.type] ?? 0);
      node.setSize([width, Math.max(height, node.type === 'CLIPTextEncode' ? 120 : 0)]);
      node.pos = [x, y];
      y += node.size[1] + TITLE + GAP;
    }
    const group = new LiteGraph.LGraphGroup(title);
    group.color = color;
    group.pos = [x - MARGIN, -HEADER];
    group.size = [width + 2 * MARGIN, y - TITLE - GAP + MARGIN + HEADER];
    app.graph.add(group);
    return x + width;
  }

  // Queue the graph as the Run button does; resolves at its end with what happened.
  function run(seconds) {
    const seen = { previews: {}, progress: {}, outputs: [], node_errors: {}, error: null };
    const listeners = [];
    const listen = (name, handler) => {
      app.api.addEventListener(name, handler);
      listeners.push(() => app.api.removeEventListener(name, handler));
    };
    const count = (counts, id) => { counts[id] = (counts[id] ?? 0) + 1; };
    const ended = new Promise((resolve, reject) => {
      listen('b_preview_with_metadata', ({ detail }) => count(seen.previews, detail.nodeId));
      listen('progress', ({ detail }) => count(seen.progress, detail.node));
      listen('executed', ({ detail }) => seen.outputs.push(detail.node));
      listen('execution_success', resolve);
      listen('execution_error', ({ detail }) => { seen.error = detail; resolve(); });
      setTimeout(() => reject(new Error(`not finished after ${seconds} s`)), seconds * 1000);
      app.queuePrompt(0, 1).then(() => {
        seen.node_errors = JSON.parse(JSON.stringify(app.extensionManager.lastNodeErrors ?? {})); // no proxy
        if (Object.keys(seen.node_errors).length) resolve();
      }, reject);
    });
    return ended.then(settled).then(() => seen).finally(() => listeners.forEach((stop) => stop()));
  }

  const prompt = async () => (await app.graphToPrompt()).output;
  const workflow = () => app.graph.serialize();


  // [left, top, right, bottom] of the graph on the page.
  function bounds() {
    const { ds } = app.canvas;
    const boxes = [...app.graph.nodes, ...app.graph.groups].map((item) => [...item.boundingRect]); // x, y, width, height
    const place = ([x, y]) => [(x + ds.offset[0]) * ds.scale, (y + ds.offset[1]) * ds.scale];
    const least = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])) - MARGIN);
    const most = [0, 1].map((axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2])) + MARGIN);
    return [...place(least), ...place(most)].map(Math.round);
  }

  return { open, build, run, fit, bounds, prompt, workflow };
})();
