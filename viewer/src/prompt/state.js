// What the Prompt page shows, as part of its address: the same link shows the same, to the byte.
import { Problem, stream, url } from '../api.js';
import { nodeKey } from './nodes.js';

/**
 * @typedef {{text: string, target: string[], distractor: string[]}} Prompt
 * @typedef {{location: string, kind: string, unit: number | null, position: number | null, dictionary: string | null}} Changed unit null: all of the location
 * @typedef {'zero' | 'mean' | 'set' | 'scale' | 'add' | 'swap'} Action
 * @typedef {{node: Changed, action: Action, value: number | null}} Intervention
 * @typedef {'q' | 'k' | 'qk' | 'v' | null} Through
 * @typedef {{node: {location: string, kind: string, unit: number, position: number, attended: number | null, dictionary: string | null}, through: Through}} Step
 * @typedef {import('./nodes.js').Sort} Sort
 * @typedef {object} State
 * @property {Prompt} a
 * @property {Prompt | null} b
 * @property {'neuron' | 'latent'} mlp
 * @property {'head' | 'pair' | 'latent'} attention
 * @property {string[]} dictionaries whose latents are shown; empty: those that fit
 * @property {number | 'all'} position
 * @property {number} k
 * @property {Intervention[]} interventions
 * @property {Step[]} trace from the target on, the last one is shown
 * @property {string} tab
 * @property {Sort} sort
 * @property {boolean} beside whether the unchanged model stands beside the changed one
 * @property {string} filter
 * @property {string} row key of the node whose detail is open
 * @property {string} head layer and head that the attention tab shows, `3.1`
 * @property {{tokens: number, temperature: number, top_p: number, seed: number}} sample
 */

export const TABS = ['nodes', 'matrix', 'attention', 'lens', 'generate'];
export const ACTIONS = /** @type {Action[]} */ (['zero', 'mean', 'set', 'scale', 'add', 'swap']);
/** Whether an action has a number, and which one it begins with. @type {Record<Action, number | null>} */
export const FIRST_VALUE = { zero: null, mean: null, set: 1, scale: 2, add: 1, swap: null };
const SAMPLE = { tokens: 24, temperature: 0, top_p: 1, seed: 0 };
/** Longer addresses are kept by the server, and the address has their number. */
export const LONGEST = 4000;

/** @param {string} [text] @returns {Prompt} */
export const prompt = (text = '') => ({ text, target: [], distractor: [] });

/** @returns {State} */
export function initial() {
  return {
    a: prompt(), b: null, mlp: 'neuron', attention: 'head', dictionaries: [], position: -1, k: 20,
    interventions: [], trace: [], tab: 'nodes', sort: { measure: 'act_grad', side: 'A', order: 'size' },
    beside: false, filter: '', row: '', head: '', sample: { ...SAMPLE },
  };
}

/** @typedef {Record<string, string | null>} Query */

/** @param {unknown} value @param {unknown} empty */
const json = (value, empty) => {
  const text = JSON.stringify(value);
  return text === JSON.stringify(empty) ? null : text;
};

/** The parameters of the address; null for what is as in {@link initial}. @param {State} state @returns {Query} */
export function write(state) {
  const { a, b, sort } = state;
  const first = initial();
  return {
    a: a.text || null,
    t: json(a.target, []),
    d: json(a.distractor, []),
    b: b === null ? null : JSON.stringify(b.text), // an empty second prompt is one, too
    tb: b && json(b.target, []),
    db: b && json(b.distractor, []),
    mlp: state.mlp === first.mlp ? null : state.mlp,
    attn: state.attention === first.attention ? null : state.attention,
    ae: state.dictionaries.length ? state.dictionaries.join(',') : null,
    pos: state.position === first.position ? null : String(state.position),
    k: state.k === first.k ? null : String(state.k),
    iv: json(state.interventions.map(({ node: n, action, value }) => [n.location, n.kind, n.unit, n.position, n.dictionary, action, value]), []),
    tr: json(state.trace.map(({ node: n, through }) => [n.location, n.kind, n.unit, n.position, n.attended, n.dictionary, through]), []),
    tab: state.tab === first.tab ? null : state.tab,
    by: json([sort.measure, sort.side, sort.order], ['act_grad', 'A', 'size']),
    vs: state.beside ? '1' : null,
    only: state.filter || null,
    row: state.row || null,
    head: state.head || null,
    gen: json(Object.values(state.sample), Object.values(SAMPLE)),
  };
}

/** The state that an address says. What it does not say, or says wrongly, is as in {@link initial}. @param {Record<string, string>} query @returns {State} */
export function read(query) {
  const state = initial();
  state.a = { text: query.a ?? '', target: texts(query.t), distractor: texts(query.d) };
  if (query.b !== undefined) {
    const text = parsed(query.b);
    state.b = { text: typeof text === 'string' ? text : query.b, target: texts(query.tb), distractor: texts(query.db) };
  }
  if (query.mlp === 'latent') state.mlp = 'latent';
  if (query.attn === 'latent' || query.attn === 'pair') state.attention = query.attn;
  if (query.ae) state.dictionaries = query.ae.split(',');
  if (query.pos === 'all') state.position = 'all';
  else if (/^\d+$/.test(query.pos ?? '')) state.position = Number(query.pos);
  if (/^\d+$/.test(query.k ?? '')) state.k = Math.max(1, Number(query.k));
  state.interventions = list(query.iv).filter(([location, , unit, , , action]) => isNamed(location, unit ?? 0) && ACTIONS.includes(action))
    .map(([location, kind, unit, position, dictionary, action, value]) => ({ node: { location, kind, unit, position, dictionary }, action, value: value ?? FIRST_VALUE[/** @type {Action} */ (action)] }));
  state.trace = list(query.tr).filter(([location, , unit]) => isNamed(location, unit)).map(([location, kind, unit, position, attended, dictionary, through]) => ({ node: { location, kind, unit, position, attended, dictionary }, through }));
  if (TABS.includes(query.tab)) state.tab = query.tab;
  const by = parsed(query.by);
  if (Array.isArray(by) && by.length === 3) state.sort = { measure: by[0], side: by[1], order: by[2] };
  state.beside = query.vs === '1';
  state.filter = query.only ?? '';
  state.row = query.row ?? '';
  state.head = query.head ?? '';
  const sample = parsed(query.gen);
  if (Array.isArray(sample)) Object.keys(SAMPLE).forEach((key, i) => typeof sample[i] === 'number' && Object.assign(state.sample, { [key]: sample[i] }));
  return state;
}

/** @param {string | undefined} text */
function parsed(text) {
  try {
    return text === undefined ? undefined : JSON.parse(text);
  } catch {
    return undefined; // a link that was cut or edited by hand
  }
}

/** @param {string | undefined} text @returns {string[]} */
function texts(text) {
  const found = parsed(text);
  return Array.isArray(found) ? found.filter((item) => typeof item === 'string') : [];
}

/** @param {unknown} location @param {unknown} unit */
const isNamed = (location, unit) => typeof location === 'string' && Number.isInteger(unit);

/** @param {string | undefined} text @returns {any[][]} */
function list(text) {
  const found = parsed(text);
  return Array.isArray(found) ? found.filter(Array.isArray) : [];
}

/**
 * What is asked of the server: the parts of the state that change its answer, and no others.
 * @param {State} state
 */
export function debugBody(state) {
  const last = state.trace.at(-1);
  return {
    prompts: [state.a, ...(state.b ? [state.b] : [])].map((p, i) => {
      const own = i === 0 || p.target.length ? p : { ...state.a, text: p.text };
      return { text: p.text, target: own.target, distractor: own.distractor };
    }),
    units: { mlp: state.mlp, attention: state.attention },
    ...(state.dictionaries.length && { dictionaries: state.dictionaries }),
    metrics: ['activation', 'write_norm', 'direct', 'act_grad'],
    position: state.position,
    top_k: state.k,
    top_logits: 50,
    loss: true,
    interventions: interventionsBody(state),
    ...(last && { trace: { node: nodeBody(last.node), through: last.through } }),
  };
}

/**
 * The debugger's reply. Where it takes longer than `patience`, what there is of it is shown: rows stay where they are, those
 * of later layers follow below; `part` says how far it is.
 * @param {ReturnType<typeof debugBody>} body @param {AbortSignal} abort @param {(part: any) => void} show @param {number} [patience] milliseconds
 */
export async function debug(body, abort, show, patience = 400) {
  const began = performance.now();
  /** @type {any} */ let all = null;
  for await (const { event, data } of stream(url(['debug']), body, abort)) {
    if (event === 'done') return data;
    if (event === 'error') throw new Problem(data, data.status);
    if (event === 'started') all = { ...data, nodes: [], values: Object.fromEntries(body.metrics.map((name) => [name, { A: [], B: [] }])) };
    if (event === 'nodes') {
      for (const [name, sides] of Object.entries(data.values))
        all.values[name] = { A: [...all.values[name].A, ...sides.A], B: [...all.values[name].B, ...(sides.B ?? [])] };
      all = { ...all, nodes: [...all.nodes, ...data.nodes], part: data };
    }
    if (performance.now() - began > patience) show(all);
  }
  throw new Problem({ title: 'The reply has no end', detail: 'The connection was closed before everything was there.' }, 0);
}

/** A node as requests name it. @param {{location: string, unit: number | null, position?: number | null, attended?: number | null, dictionary?: string | null}} node */
export function nodeBody({ location, unit, position, attended, dictionary }) {
  return {
    location, unit,
    ...(position !== null && position !== undefined && { position }),
    ...(attended !== null && attended !== undefined && { attended }),
    ...(dictionary && { dictionary }),
  };
}

/**
 * @param {State} state
 * @param {boolean} [alone] whether the request has one prompt only: then a swap names the text that it takes from
 */
export function interventionsBody(state, alone = false) {
  return state.interventions.map(({ node, action, value }) => ({
    node: nodeBody(node), action,
    ...(value !== null && { value }),
    ...(alone && action === 'swap' && { source: state.b?.text ?? '' }),
  }));
}

/** The two prompts change places; interventions and traces are of A, and go with the text that is A then. @param {State} state @returns {State} */
export function swapped(state) {
  if (!state.b) return state;
  const own = state.b.target.length ? state.b : { ...state.a, text: state.b.text };
  return { ...state, a: own, b: state.a, trace: [], row: '' };
}

/** Whether two interventions are of the same unit and tokens. @param {Intervention} x @param {Intervention} y */
export function sameUnit(x, y) {
  return nodeKey(x.node) === nodeKey(y.node);
}
