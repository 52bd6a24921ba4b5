// Nodes as the Prompt page handles them: names, keys, rows of the table, and what can be done to each kind.
import { visible } from '../format.js';
import { dictionaries } from '../state.js';

/**
 * @typedef {{location: string, layer: number | null, unit: number, kind: string, position: number | null,
 *   position_b?: number | null, attended?: number | null, dictionary?: string | null, label?: string | null}} Node
 * @typedef {Record<string, {A: (number | null)[], B?: (number | null)[]}>} Values measure -> one number a node
 * @typedef {{node: Node, key: string, index: number}} Row
 */

/** The measures in the order of their columns, and what they are called. */
export const MEASURES = /** @type {const} */ (['activation', 'write_norm', 'direct', 'act_grad']);
/** @typedef {typeof MEASURES[number]} Measure */
export const MEASURE_TEXT = {
  activation: { name: 'Activation', what: 'the value of the unit' },
  write_norm: { name: 'Write', what: 'the length of what the unit writes into the stream' },
  direct: { name: 'Direct effect', what: 'effect on the target through no later layer' },
  act_grad: { name: 'Total effect', what: 'estimated effect of the unit on the target, through all later layers' },
};

/** The same for the same node, in every reply. @param {Omit<Node, 'layer' | 'unit'> & {unit: number | null}} node */
export function nodeKey({ location, kind, unit, position, position_b: b, attended }) {
  return [location, kind, unit, position ?? (b === null || b === undefined ? '' : `B${b}`), attended ?? ''].join('|');
}

/** The layer that a location names; null if it names none. @param {string} location */
export function layerOf(location) {
  const found = /^(\d+)\//.exec(location);
  return found ? Number(found[1]) : null;
}

/** @param {string} location */
function isAttention(location) {
  return /attn/.test(location);
}

/** Short enough for a table; unit null: all of the location. @param {{location: string, kind: string, unit: number | null}} node */
export function nodeName({ location, kind, unit }) {
  const layer = layerOf(location);
  const at = layer === null ? '' : `L${layer} `;
  if (unit === null) return `all of ${location}`;
  if (['neuron', 'head'].includes(kind) && !/\/(mlp.post_act|attn.v_out)$/.test(location)) return `${location} ${unit}`;
  const part = isAttention(location) ? 'attn' : /mlp/.test(location) ? 'MLP' : '';
  switch (kind) {
    case 'head':
    case 'pair':
      return `${at}head ${unit}`;
    case 'neuron':
      return `${at}neuron ${unit}`;
    case 'latent':
      return `${at}${part} latent ${unit}`;
    case 'error':
      return `${at}${part} error`;
    case 'embedding':
      return 'embedding';
    case 'bias':
      return `${at}${part ? `${part} ` : ''}bias`;
    default:
      return `${location} ${unit}`;
  }
}

/** Kinds that a gradient can start at, and that an intervention can change. */
const UNITS = ['neuron', 'latent', 'head', 'pair'];

const ONLY_IN_B = 'This token stands only in the second prompt; swap the two to look at it.';

/** Why a node cannot be traced; null if it can. @param {Pick<Node, 'kind' | 'position'>} node */
export function whyNotTraced({ kind, position }) {
  if (position === null) return ONLY_IN_B;
  if (UNITS.includes(kind)) return null;
  const why = /** @type {Record<string, string>} */ ({
    embedding: 'An embedding is where the stream begins: nothing comes before it.',
    bias: 'A bias is a constant of the model: nothing on this prompt makes it what it is.',
    error: 'An error is what the autoencoder does not capture: it is a whole vector, not one number.',
  });
  return why[kind] ?? `A ${kind} cannot be traced.`;
}

/** Why a node cannot be changed; null if it can. @param {Pick<Node, 'kind' | 'position'>} node */
export function whyNotChanged({ kind, position }) {
  if (position === null) return ONLY_IN_B;
  return UNITS.includes(kind) ? null : `Interventions change neurons, latents and heads; this is ${kind === 'embedding' || kind === 'error' ? 'an' : 'a'} ${kind}.`;
}

/** The page that shows a unit by itself; null if there is none. @param {Node} node @returns {(string | number)[] | null} */
export function pageOf({ kind, dictionary, unit, location }) {
  if (dictionary && kind === 'latent') return ['f', dictionary, unit];
  const store = kind === 'neuron' && dictionaries.peek().find((one) => one.kind === 'neuron' && one.location === location);
  if (store) return ['f', store.id, unit];
  if (kind === 'head' || kind === 'pair') return ['h', layerOf(location) ?? 0, unit];
  return null;
}

/** @typedef {'A' | 'B' | 'diff'} Side */

/** The number of one cell. @param {Values} values @param {Measure} measure @param {number} index @param {Side} side @returns {number | null} */
export function cell(values, measure, index, side) {
  const found = values[measure];
  const a = found?.A?.[index] ?? null;
  if (side === 'A') return a;
  const b = found?.B?.[index] ?? null;
  return side === 'B' ? b : a === null || b === null ? null : a - b;
}

/** @typedef {{measure: Measure, side: Side, order: 'size' | 'down' | 'up'}} Sort */

/**
 * Rows in order; numbers that are not there come last, and equal ones stay in the order of the model. Without an order,
 * they stay as they are.
 * @param {Node[]} nodes @param {Values} values @param {Sort | null} sort @param {string} [filter]
 * @param {(node: Node) => string} [more] further text that the filter looks into
 * @returns {Row[]}
 */
export function rowsOf(nodes, values, sort, filter = '', more = () => '') {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = nodes.map((node, index) => ({ node, index, key: nodeKey(node) }));
  const kept = rows.filter(({ node }) => {
    const text = `${nodeName(node)} ${node.kind} ${node.location} ${node.label ?? ''} ${more(node)}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  if (!sort) return kept;
  const sign = sort.order === 'up' ? 1 : -1;
  const at = new Map(
    kept.map((row) => {
      const value = cell(values, sort.measure, row.index, sort.side);
      return [row, value === null ? null : sort.order === 'size' ? Math.abs(value) : value];
    }),
  );
  return kept.sort((a, b) => {
    const [x, y] = [at.get(a) ?? null, at.get(b) ?? null];
    if (x === null || y === null) return (x === null ? 1 : 0) - (y === null ? 1 : 0) || a.index - b.index;
    return sign * (x - y) || a.index - b.index;
  });
}

/** The order that another click on the same column gives. @param {Sort} sort @param {Measure} measure @param {Side} side @returns {Sort} */
export function nextSort(sort, measure, side) {
  if (sort.measure !== measure || sort.side !== side) return { measure, side, order: 'size' };
  const order = sort.order === 'size' ? 'down' : sort.order === 'down' ? 'up' : 'size';
  return { measure, side, order };
}

/**
 * A reply under interventions beside that of the unchanged model: A is changed, B is not. Nodes that only one
 * of them lists have one number.
 * @param {any} changed @param {any} plain
 */
export function beside(changed, plain) {
  const places = new Map(plain.nodes.map((/** @type {Node} */ node, /** @type {number} */ i) => [nodeKey(node), i]));
  const own = changed.nodes.map((/** @type {Node} */ node) => places.get(nodeKey(node)) ?? -1);
  const others = plain.nodes.map((/** @type {Node} */ _, /** @type {number} */ i) => i).filter((/** @type {number} */ i) => !own.includes(i));
  const values = Object.fromEntries(
    Object.entries(changed.values).map(([measure, { A }]) => {
      const from = plain.values[measure].A;
      return [measure, { A: [...A, ...others.map(() => null)], B: [...own.map((/** @type {number} */ i) => (i < 0 ? null : from[i])), ...others.map((/** @type {number} */ i) => from[i])] }];
    }),
  );
  return { ...changed, nodes: [...changed.nodes, ...others.map((/** @type {number} */ i) => plain.nodes[i])], values };
}

/** A token of a prompt, and where it stands. @param {number[]} ids @param {Record<string, string>} vocab @param {number | null} position */
export function tokenAt(ids, vocab, position) {
  const id = ids[position ?? -1];
  return id === undefined ? '' : visible(vocab[id] ?? `#${id}`).replace(/^ /, '␣');
}

/**
 * Units by token: one row a unit, one number a position.
 * @param {Node[]} nodes @param {Values} values @param {Measure} measure @param {'A' | 'B' | 'diff'} side @param {number} length
 * @returns {{name: string, node: Node, values: (number | null)[]}[]} the unit with the largest number first
 */
export function matrixOf(nodes, values, measure, side, length) {
  /** @type {Map<string, {name: string, node: Node, values: (number | null)[]}>} */
  const units = new Map();
  nodes.forEach((node, index) => {
    const key = [node.location, node.kind, node.unit].join('|');
    let unit = units.get(key);
    if (!unit) units.set(key, (unit = { name: nodeName(node), node, values: Array(length).fill(null) }));
    const value = cell(values, measure, index, side);
    if (value !== null && node.position !== null) unit.values[node.position] = (unit.values[node.position] ?? 0) + value;
  });
  const size = (/** @type {{values: (number | null)[]}} */ unit) => Math.max(...unit.values.map((x) => Math.abs(x ?? 0)));
  return [...units.values()].sort((a, b) => size(b) - size(a));
}
