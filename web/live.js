// What nodes that show something while their widgets change have in common.
import { api } from '../../scripts/api.js';

// Calls `work` after whatever `target[name]` does already.
export function after(target, name, work) {
  const before = target[name];
  target[name] = function (...values) {
    const result = before?.apply(this, values);
    work(...values);
    return result;
  };
}

// Once the whole graph is there, and whenever a link of the node changes.
export function afterLinks(node, work) {
  for (const name of ['onConfigure', 'onConnectionsChange']) after(node, name, () => setTimeout(work));
}

// Sends a node's widgets, and `more`, to the server; what it objects to becomes an Error.
export async function post(node, path, more) {
  const values = Object.fromEntries(node.widgets.map(({ name, value }) => [name, value]));
  const response = await api.fetchApi(`/diffportrait3d/${path}`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...values, ...more }),
  });
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

// One request at a time; what changes meanwhile is asked for afterwards, once.
export class Requests {
  constructor(ask, report) {
    Object.assign(this, { ask, report, asking: false, changed: false });
  }

  async update() {
    this.changed = true;
    if (this.asking) return;
    this.asking = true;
    while (this.changed) {
      this.changed = false;
      await this.ask().catch(this.report);
    }
    this.asking = false;
  }
}
