// What tools/frontend.py asks of ComfyUI's page: its functions are called there by name.
window.diffportrait3d = (() => {
  const { app, LiteGraph } = window;
  // Room below the widgets for what a run, or the editor at once, shows there. None for previews, which are off by
  // default: nodes that grow when they are on (and Load Image, once it has an image) are at the end of a column.
  const IMAGES = { SaveImage: 220, PreviewImage: 220, SaveVideo: 260, DP3D_ReferenceView: 220, Load3D: 200 };
  const COLUMN_WIDTH = 276;
  const GAP = 20;
  const COLUMN_GAP = 46;
  const TITLE = 30; // of a node; above pos
  const MARGIN = 16; // of a group around its nodes
  const HEADER = 46; // of a group
  const SOCKETS = 200; // between a subgraph's inputs and its nodes
  const MUTED = 2; // LiteGraph's mode `never`

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

  async function open(workflow, title) {
    await app.loadGraphData(workflow, true, true, title, { openSource: 'template' });
    await settled();
    return unknown();
  }

  // API form and layout -> the editor's form: columns of nodes, most of them titled. Nodes in `unused` are muted;
  // those of `subgraph` become one node, `subgraph` in the columns as the note is `note`.
  async function build(prompt, layout) {
    const all = { ...prompt, ...layout.unused };
    app.clean(); // else images of the graph before stay on nodes of the same number
    await app.loadApiJson(all, layout.title);
    await settled();
    const missing = unknown();
    if (missing.length) return missing;
    for (const node of app.graph.nodes) {
      const title = all[node.id]._meta?.title;
      if (title && title !== node.constructor.title) node.title = title;
      for (const widget of node.widgets ?? []) setUnsaid(widget, node, all[node.id].inputs);
      if (node.id in (layout.unused ?? {})) mute(node);
    }
    const named = { note: makeNote(layout.note) };
    if (layout.subgraph) named.subgraph = makeSubgraph(layout.subgraph);
    placeColumns(layout.columns, named);
    await fit();
    return [];
  }

  // An image that happens to be in the input folder is not to make the node larger.
  function mute(node) {
    node.mode = MUTED;
    node.setSizeForImage = () => {};
  }

  // The editor leaves what the prompt does not say as it was in the graph before.
  function setUnsaid(widget, { constructor: { nodeData } }, said) {
    if (widget.name === 'control_after_generate') widget.value = 'fixed';
    const options = (nodeData.input.optional?.[widget.name] ?? nodeData.input.required?.[widget.name] ?? [])[1];
    if (options && !(widget.name in said)) widget.value = options.default ?? options.options?.[0] ?? widget.value;
  }

  function makeNote({ text, height }) {
    const note = LiteGraph.createNode('MarkdownNote');
    app.graph.add(note);
    note.title = 'About this graph';
    note.widgets[0].value = text.join('\n');
    note.computeSize = () => [0, height];
    return note;
  }

  // Arranges the nodes of `columns` and folds them into one, whose inputs come in the order of the nodes.
  function makeSubgraph({ title, labels, widgets, outputs, columns }) {
    const groups = placeColumns(columns, {});
    const inside = columns.flatMap((column) => column.nodes).map((id) => app.graph.getNodeById(Number(id)));
    const { subgraph, node } = app.graph.convertToSubgraph(new Set([...inside, ...groups]));
    node.title = subgraph.name = title;
    const inner = (id) => subgraph.getNodeById(Number(id));
    const right = Math.max(...groups.map(({ pos, size }) => pos[0] + size[0]));
    subgraph.inputNode.pos = [-SOCKETS, 0]; // the editor takes them for lower than they are
    subgraph.outputNode.pos = [right + SOCKETS / 2, 0];
    for (const [id, names] of Object.entries(widgets)) {
      for (const name of names) promote(subgraph, inner(id), name);
    }
    for (const [name, [id, slot]] of Object.entries(outputs)) {
      const { type } = inner(id).outputs[slot];
      subgraph.addOutput(name, type).connect(inner(id).outputs[slot], inner(id));
    }
    for (const slot of [...subgraph.inputs, ...subgraph.outputs]) if (labels[slot.name]) slot.label = labels[slot.name];
    for (const slot of [...node.inputs, ...node.outputs]) if (labels[slot.name]) slot.label = labels[slot.name];
    return node;
  }

  // Shows a widget of an inner node on the subgraph's node; the editor has done so for some of its own choice.
  function promote(subgraph, node, name) {
    const input = node.inputs.find((slot) => slot.name === name);
    if (input.link == null) subgraph.addInput(name, input.type).connect(input, node);
  }

  // Places the columns from left to right; returns the groups around those that have a title.
  function placeColumns(columns, named) {
    const groups = [];
    let x = 0;
    for (const column of columns) {
      groups.push(...placeColumn(column, named, x));
      x += (column.width ?? COLUMN_WIDTH) + COLUMN_GAP;
    }
    return groups;
  }

  // Puts the nodes below each other, the last one down to `height` if that is given, and a group around them.
  function placeColumn({ title, color, nodes: ids, width = COLUMN_WIDTH, height: bottom = 0 }, named, x) {
    let y = TITLE;
    for (const id of ids) {
      const node = named[id] ?? app.graph.getNodeById(Number(id));
      const height = node.computeSize()[1] + (IMAGES[node.type] ?? 0);
      const least = id === ids.at(-1) ? bottom - y : 0;
      node.setSize([width, Math.max(height, least, node.type === 'CLIPTextEncode' ? 120 : 0)]);
      node.pos = [x, y];
      y += node.size[1] + TITLE + GAP;
    }
    if (!title) return [];
    const group = new LiteGraph.LGraphGroup(title);
    group.color = color;
    group.pos = [x - MARGIN, -HEADER];
    group.size = [width + 2 * MARGIN, y - TITLE - GAP + MARGIN + HEADER];
    app.graph.add(group);
    return [group];
  }

  // The subgraph's node as a blueprint, the form in which the editor publishes one; null where there is none.
  function blueprint({ description, aliases }) {
    const node = app.graph.nodes.find((candidate) => candidate.isSubgraphNode?.());
    if (!node) return null;
    const { nodes, subgraphs } = app.canvas._serializeItems([node]);
    Object.assign(subgraphs[0], { category: 'DiffPortrait3D', description });
    const extra = { BlueprintDescription: description, BlueprintSearchAliases: aliases };
    return { revision: 0, last_node_id: node.id, last_link_id: 0, nodes, links: [], version: 0.4,
      definitions: { subgraphs }, extra };
  }

  // Queue the graph as the Run button does; resolves at its end with what happened.
  function run(seconds) {
    const seen = { previews: {}, progress: {}, outputs: [], files: [], node_errors: {}, error: null };
    const listeners = [];
    const listen = (name, handler) => {
      app.api.addEventListener(name, handler);
      listeners.push(() => app.api.removeEventListener(name, handler));
    };
    const count = (counts, id) => { counts[id] = (counts[id] ?? 0) + 1; };
    const ended = new Promise((resolve, reject) => {
      listen('b_preview_with_metadata', ({ detail }) => count(seen.previews, detail.nodeId));
      listen('progress', ({ detail }) => count(seen.progress, detail.node));
      listen('executed', ({ detail }) => {
        seen.outputs.push(detail.node);
        for (const { subfolder, filename } of detail.output?.images ?? []) seen.files.push([subfolder, filename]);
      });
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

  // How many views are made; the widget may be a subgraph's.
  function setViews(count) {
    const widgets = app.graph.nodes.flatMap((node) => node.widgets ?? []);
    widgets.find(({ name }) => name === 'views').value = count;
  }

  const prompt = async () => (await app.graphToPrompt()).output;

  // Without the view of this page: a template is opened to fit.
  function workflow() {
    const saved = app.graph.serialize();
    delete saved.extra.ds;
    return saved;
  }

  // Title -> [left, top, right, bottom] on the page, of every node with its title bar.
  function boxes() {
    const { offset, scale } = app.canvas.ds;
    const place = (x, y) => [(x + offset[0]) * scale, (y + offset[1]) * scale];
    return Object.fromEntries(app.graph.nodes.map((node) => {
      const [x, y, width, height] = node.boundingRect;
      return [`${node.id} ${node.title}`, [...place(x, y), ...place(x + width, y + height)]];
    }));
  }

  return { open, build, blueprint, setViews, run, boxes, prompt, workflow };
})();
