// Align Portrait shows its photograph with the five points, to be dragged, the frame of the crop and the crop itself, as
// a run would make them.
import { app } from '../../scripts/app.js';
import { api } from '../../scripts/api.js';
import { Requests, after, afterLinks, post } from './live.js';

const NODE = 'DP3D_AlignPortrait';
const NAMES = ['eye on the left', 'eye on the right', 'tip of the nose', 'mouth corner on the left', 'mouth corner on the right'];
// Where the points of a face lie in a square around it, for photographs in which nothing was found.
const FIRST = [[0.42, 0.42], [0.58, 0.42], [0.5, 0.52], [0.44, 0.62], [0.56, 0.62]];
const SVG = 'http://www.w3.org/2000/svg';

function element(parent, name, style, namespace) {
  const made = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
  Object.assign(made.style, style);
  parent?.append(made);
  return made;
}

// The file that Load Image holds: its name, and where the server shows it. Nothing for other nodes, which have an image
// after a run only.
function loaded(node) {
  const source = node.getInputNode(node.findInputSlot('image'));
  const { value, options } = source?.widgets?.find(({ name }) => name === 'image') ?? {};
  if (source?.comfyClass !== 'LoadImage' || !options?.values?.includes?.(value)) return undefined;
  const [, subfolder, filename] = value.match(/^(?:(.*)\/)?([^/]*)$/);
  return { name: value, file: { filename, subfolder: subfolder ?? '', type: 'input' } };
}

class Overlay {
  constructor(node) {
    this.node = node;
    this.requests = new Requests(() => this.ask(), (error) => this.say(error.message));
    this.body = element(null, 'div', { overflow: 'hidden', font: '12px sans-serif', color: '#ddd' });
    this.frame = element(this.body, 'div', { position: 'relative', margin: '0 auto', lineHeight: 0, touchAction: 'none' });
    this.photograph = element(this.frame, 'img', { width: '100%' });
    this.photograph.draggable = false;
    this.drawing = element(this.frame, 'svg', { position: 'absolute', inset: 0, width: '100%', height: '100%' }, SVG);
    this.square = element(this.drawing, 'polygon', { fill: 'none', stroke: '#7cf' }, SVG);
    this.points = NAMES.map((name, index) => this.makePoint(name, index));
    const below = element(this.body, 'div', { display: 'flex', gap: '8px', marginTop: '6px' });
    this.crop = element(below, 'img', { width: '128px', height: '128px', background: '#222', flex: 'none' });
    this.text = element(below, 'div', { whiteSpace: 'pre-line', lineHeight: 1.4 });
    this.photograph.onload = () => this.place();
    this.say('Connect Load Image, or run once.');
  }

  makePoint(name, index) {
    const point = element(this.drawing, 'circle', { cursor: 'grab', fill: '#fd0a', stroke: '#000' }, SVG);
    element(point, 'title', {}, SVG).textContent = name;
    point.onpointerdown = (event) => {
      event.stopPropagation();
      point.setPointerCapture(event.pointerId);
      this.dragging = true;
    };
    point.onpointermove = (event) => {
      if (!point.hasPointerCapture(event.pointerId)) return;
      const box = this.drawing.getBoundingClientRect();
      this.found[index] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      this.place();
    };
    point.onlostpointercapture = () => {
      this.dragging = false;
      this.write();
    };
    return point;
  }

  say(text) {
    this.text.textContent = text;
  }

  widget(name) {
    return this.node.widgets.find((each) => each.name === name);
  }

  // Puts the drawing over the photograph: `found` and `corners` are parts of its size.
  place() {
    const { naturalWidth: width, naturalHeight: height } = this.photograph;
    if (!width || !this.found) return;
    const size = Math.max(width, height);
    this.frame.style.width = `${(100 * width) / size}%`; // tall ones, too, in a square as wide as the node
    this.drawing.setAttribute('viewBox', `0 0 ${width} ${height}`);
    this.square.setAttribute('points', (this.corners ?? []).map(([x, y]) => `${x * width},${y * height}`).join(' '));
    this.square.setAttribute('stroke-width', size / 250);
    this.points.forEach((point, index) => {
      const [x, y] = this.found[index];
      const shape = { cx: x * width, cy: y * height, r: size / 80, 'stroke-width': size / 500 };
      for (const key in shape) point.setAttribute(key, shape[key]);
    });
  }

  write() {
    const points = this.widget('points');
    points.value = this.found.map((place) => place.map((part) => part.toFixed(4)).join(' ')).join(', ');
    points.callback?.(points.value);
  }

  // What a run or the server says: see host/photographs.py.
  show({ points, corners, angles: [yaw, pitch, roll], crop }) {
    this.corners = corners;
    if (!this.dragging && !this.requests.changed) this.found = points; // else the answer is older than what the hand did
    this.crop.src = crop;
    this.say(`yaw ${yaw}\u00b0\npitch ${pitch}\u00b0\nroll ${roll}\u00b0`);
    this.place();
  }

  // Another photograph was chosen: the points were those of the last one.
  forget() {
    this.found = undefined;
    this.widget('points').value = '';
    this.requests.update();
  }

  open(file) {
    const address = api.apiURL(`/view?${new URLSearchParams(file)}`);
    if (this.photograph.src !== address) this.photograph.src = address;
  }

  async ask() {
    const linked = this.node.isInputConnected(this.node.findInputSlot('landmarks'));
    const source = loaded(this.node) ?? this.last;
    if (!source) return;
    this.open(source.file);
    if (linked) return this.say('Landmarks are connected: run to see what they give.');
    if (!this.widget('points').value) this.say('Looking for the face ...');
    try {
      const response = await post(this.node, 'align_portrait', { shown: undefined, photograph: source.name });
      this.show(await response.json());
    } catch (error) {
      this.found ??= FIRST.map((place) => [...place]);
      this.corners = null;
      this.crop.removeAttribute('src');
      this.place();
      this.say(error.message.replace(/^\w+Error: /, ''));
    }
  }

  // After a run, also of photographs that come from other nodes.
  ran({ photograph: [file], alignment: [answer] }) {
    this.last = { name: `${file.filename} [temp]`, file };
    this.open(file);
    this.show(answer);
  }
}

app.registerExtension({
  name: 'DiffPortrait3D.AlignPortrait',
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const overlay = new Overlay(node);
    const getMinHeight = () => node.size[0] + 120; // a square and the crop
    const shown = node.addDOMWidget('shown', 'dp3d_photograph', overlay.body, { serialize: false, getMinHeight });
    shown.serialize = false; // not in saved graphs
    afterLinks(node, () => watch(overlay));
    after(node, 'onExecuted', (output) => output?.alignment && overlay.ran(output));
    after(node, 'onResize', () => {
      const [width, least] = [node.size[0], node.computeSize()[1]];
      if (node.size[1] < least) node.setSize([width, least]);
    });
    for (const widget of node.widgets) if (widget !== shown) after(widget, 'callback', () => overlay.requests.update());
  },
});

// Asks again when the file of the connected Load Image changes, too.
function watch(overlay) {
  const source = overlay.node.getInputNode?.(overlay.node.findInputSlot('image'));
  const file = source?.widgets?.find(({ name }) => name === 'image');
  if (file && !file.watched?.has(overlay)) {
    (file.watched ??= new Set()).add(overlay);
    after(file, 'callback', () => overlay.forget());
  }
  if (overlay.node.graph) overlay.requests.update();
}
