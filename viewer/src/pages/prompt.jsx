// `#/p`: what a model does on a prompt, part by part, and what it does when parts are changed.
import { useEffect, useMemo, useRef, useState } from 'preact/hooks';
import { get, post, url, useAsk } from '../api.js';
import { notify } from '../components/notice.js';
import { Panel } from '../components/panel.jsx';
import { Answer, Empty, Failure, Loading } from '../components/states.jsx';
import { Tabs } from '../components/tabs.jsx';
import { Unready } from '../components/unready.jsx';
import { fixed, percentage, plural, visible } from '../format.js';
import { useKeys } from '../keys.js';
import { Candidates, TokenEffects, Verdict } from '../prompt/answer.jsx';
import { Attention } from '../prompt/attention.jsx';
import { Detail } from '../prompt/detail.jsx';
import { Fields } from '../prompt/fields.jsx';
import { Generate } from '../prompt/generate.jsx';
import { Lens } from '../prompt/lens.jsx';
import { Matrix } from '../prompt/matrix.jsx';
import { beside, pageOf, rowsOf, tokenAt, whyNotChanged, whyNotTraced } from '../prompt/nodes.js';
import { FIRST_VALUE, LONGEST, TABS, debug, debugBody, initial, interventionsBody, read, sameUnit, swapped, write } from '../prompt/state.js';
import { NodeTable } from '../prompt/table.jsx';
import { Breadcrumb, Tray } from '../prompt/tray.jsx';
import { go, href } from '../router.js';
import { model, modelState } from '../state.js';
import { Astray, isAstray } from './astray.jsx';

/** @typedef {import('../prompt/state.js').State} State */
/** @typedef {import('../prompt/state.js').Intervention} Intervention */
/** @typedef {import('../prompt/nodes.js').Node} Node */
/** @typedef {import('../prompt/nodes.js').Row} Row */

const TAB_TEXT = /** @type {Record<string, string>} */ ({ nodes: 'Nodes', matrix: 'Tokens × nodes', attention: 'Attention', lens: 'Lens', generate: 'Generate' });

/** Two prompts that show something, for models whose tokens they are made of. */
const EXAMPLES = [
  { of: 'tiny-tales', a: { text: 'The queen went into the forest, and when', target: [' she'], distractor: [' he'] } },
  { of: '', a: { text: 'When Mary and John went to the store, John gave a drink to', target: [' Mary'], distractor: [' John'] } },
];

function example() {
  const name = model.value?.name ?? '';
  return (EXAMPLES.find(({ of }) => name.includes(of)) ?? EXAMPLES[1]).a;
}

/** @param {{query: Record<string, string>}} props */
export function PromptPage({ query }) {
  const first = useRef(Object.keys(query).length === 0).current;
  useEffect(() => {
    // An empty page says little: it begins with an example, unless something has been typed already.
    const typed = /** @type {HTMLTextAreaElement | null} */ (document.getElementById('text-a'))?.value;
    if (first && !typed && model.value && !location.hash.includes('?')) go(href(['p'], write({ ...initial(), a: example() })), { replace: true });
  }, [model.value]);
  const kept = useAsk(query.s ?? null, (signal) => get(url(['sessions', query.s]), { signal }));
  if (query.s && kept.error)
    return (
      <div class="page">
        {isAstray(kept.error) ? (
          <Astray title="What this link shows is not here" why={<>A page that is too long for a link is kept by the server that made the link, and the link has its number. This server knows no <code>{visible(query.s)}</code>: another server made it, it was forgotten, or a part of the link is missing.</>} places={[['Start afresh', href(['p'])]]} />
        ) : <Failure problem={kept.error} retry={kept.retry} />}
      </div>
    );
  if (query.s && !kept.data) return <div class="page"><Loading lines={6} /></div>;
  return <Page query={query.s ? kept.data.state : query} />;
}

/** The state, and a function that changes it: the address follows. @param {Record<string, string>} query */
function useState_(query) {
  const state = useMemo(() => read(query), [JSON.stringify(query)]);
  const latest = useRef(state);
  latest.current = state;
  /** @param {Partial<State>} patch @param {{push?: boolean}} [options] push: Back undoes it */
  function update(patch, { push = false } = {}) {
    latest.current = { ...latest.current, ...patch };
    const address = href(['p'], write(latest.current));
    if (address.length <= LONGEST) return go(address, { replace: !push });
    const kept = Object.fromEntries(Object.entries(write(latest.current)).filter(([, value]) => value !== null));
    return post(url(['sessions']), { state: kept }).then(
      ({ id }) => go(href(['p'], { s: id }), { replace: !push }),
      (problem) => notify(`The state of this page is too long for a link: ${problem.message}`, 'bad'),
    );
  }
  return /** @type {const} */ ([state, update]);
}

/** Whether two replies are of the same texts. @param {any} x @param {any} y */
function sameTexts(x, y) {
  const texts = (/** @type {any} */ reply) => JSON.stringify(reply.prompts.map((/** @type {any} */ one) => one.ids));
  return texts(x) === texts(y);
}

/** Interventions before and after, for undo and redo; as long as the page is open. */
function useHistory() {
  return useRef({ past: /** @type {Intervention[][]} */ ([]), future: /** @type {Intervention[][]} */ ([]) }).current;
}

/** @param {{query: Record<string, string>}} props */
function Page({ query }) {
  const [state, update] = useState_(query);
  const history = useHistory();
  const empty = !state.a.text;
  const body = debugBody(state);
  const ready = modelState.value === 'ready';
  const asked = useAsk(empty || !ready ? null : JSON.stringify(body), (signal, show) => debug(body, signal, show));
  const [current, setCurrent] = useState('');
  const data = asked.data;
  const partial = data?.sublayers !== undefined;
  const whole = useRef(/** @type {any} */ (null));
  if (data && !partial) whole.current = data;
  // Rows of the same texts keep their place until all the new ones are there; of other texts, what there is is shown.
  const old = partial && whole.current && sameTexts(whole.current, data) ? whole.current : null;
  const found = old ?? data;
  const wanted = state.beside && state.interventions.length > 0 && state.b === null;
  const plain = { ...body, interventions: [] };
  const unchanged = useAsk(wanted && ready && !empty ? JSON.stringify(plain) : null, (signal) => post(url(['debug']), plain, { signal }));
  const table = useMemo(() => (wanted && found && unchanged.data ? beside(found, unchanged.data) : found), [found, wanted && unchanged.data]);
  const two = state.b !== null && data?.prompts?.length === 2;
  const changed = state.interventions.length > 0;
  const sideways = two || table !== found;
  const rows = useMemo(
    () => (table ? rowsOf(table.nodes, table.values, partial && !old ? null : state.sort, state.filter, (node) => tokenAt(table.prompts[0].ids, table.vocab, node.position)) : []),
    [table, JSON.stringify(state.sort), state.filter],
  );
  const row = rows.find((one) => one.key === current) ?? rows.find((one) => one.key === state.row) ?? rows[0];

  /** @param {Intervention[]} next */
  function change(next) {
    history.past.push(state.interventions);
    history.future = [];
    update({ interventions: next });
  }
  /** @param {'past' | 'future'} from */
  function step(from) {
    const found = history[from].pop();
    if (!found) return notify(from === 'past' ? 'Nothing to undo' : 'Nothing to redo');
    history[from === 'past' ? 'future' : 'past'].push(state.interventions);
    update({ interventions: found });
  }
  /** @param {Node} node @param {import('../prompt/state.js').Action} action @param {boolean} [everywhere] */
  function intervene(node, action, everywhere = false) {
    const why = whyNotChanged(node);
    if (why) return notify(why, 'bad');
    const kind = node.kind === 'pair' ? 'head' : node.kind;
    const location = node.location.replace('attn.qk_probs', 'attn.v_out'); // of a pair, the whole head is changed

    /** @type {Intervention} */
    const next = { node: { location, kind, unit: node.unit, position: everywhere ? null : node.position, dictionary: node.dictionary ?? null }, action, value: FIRST_VALUE[action] };
    const others = state.interventions.filter((one) => !sameUnit(one, next));
    const same = state.interventions.find((one) => sameUnit(one, next));
    change(same && same.action === action ? others : [...others, next]);
  }
  /** @param {Node} node @param {import('../prompt/state.js').Through} through */
  function traceFrom(node, through) {
    const why = whyNotTraced(node);
    if (why) return notify(why, 'bad');
    const { location, kind, unit, position, attended = null, dictionary = null } = node;
    if (position === null) return;
    update({ trace: [...state.trace, { node: { location, kind, unit, position, attended, dictionary }, through }], row: '' }, { push: true });
    setCurrent('');
  }
  /** @param {Row} one */
  const traceRow = ({ node }) => traceFrom(node, node.kind === 'head' ? 'v' : node.kind === 'pair' ? 'qk' : null);
  /** @param {Row} one */
  const toggle = (one) => update({ row: state.row === one.key ? '' : one.key });
  /** @param {number} by */
  function move(by) {
    const at = rows.findIndex((one) => one.key === row?.key);
    const next = rows[Math.min(Math.max(at + by, 0), rows.length - 1)];
    if (next) setCurrent(next.key);
    // Only a step scrolls: the keyboard's next stop is counted from where was scrolled to.
    requestAnimationFrame(() => document.querySelector('table.nodes tr.current')?.scrollIntoView({ block: 'nearest' }));
  }
  /** @param {number} by */
  function moveToken(by) {
    if (!data) return;
    const n = data.prompts[0].ids.length;
    const at = state.position === 'all' || state.position < 0 ? n - 1 : state.position;
    update({ position: Math.min(Math.max(at + by, 0), n - 1) });
  }
  const swap = () => (state.b ? update(swapped(state), { push: true }) : notify('There is no second prompt'));
  useKeys('Prompt', [
    ...(asked.loading ? [{ keys: 'Escape', what: 'Stop the request', inText: true, run: (/** @type {KeyboardEvent | null} */ event) => (event?.target instanceof HTMLSelectElement ? event.target.blur() : asked.cancel()) }] : []),
    { keys: 'j', what: 'Next node', run: () => move(1) },
    { keys: 'k', what: 'Node before', run: () => move(-1) },
    { keys: 'h', what: 'Nodes of the token before', run: () => moveToken(-1) },
    { keys: 'l', what: 'Nodes of the next token', run: () => moveToken(1) },
    { keys: 'a', what: 'Set the node to 0, or back', run: () => row && intervene(row.node, 'zero') },
    { keys: 's', what: 'Steer along the node', run: () => row && intervene(row.node, row.node.kind === 'head' ? 'scale' : 'add', true) },
    { keys: 't', what: 'Trace the node', run: () => row && traceRow(row) },
    { keys: 'T', what: 'Back to the trace before', run: () => (state.trace.length ? update({ trace: state.trace.slice(0, -1), row: '' }, { push: true }) : notify('Nothing is traced')) },
    { keys: 'Enter', what: 'Open or close the node', run: (event) => (event?.target instanceof HTMLElement && event.target.closest('button, a, summary') ? event.target.click() : row && toggle(row)) },
    { keys: 'o', what: 'Open the page of the node', run: () => { const page = row && pageOf(row.node); if (page) go(href(page)); else notify('This node has no page'); } },
    { keys: 'x', what: 'Swap the two prompts', run: swap },
    { keys: 'u', what: 'Undo the last intervention', run: () => step('past') },
    { keys: 'U', what: 'Redo it', run: () => step('future') },
    ...TABS.map((tab, i) => ({ keys: String(i + 1), what: `Show ${TAB_TEXT[tab]}`, run: () => update({ tab }, { push: true }) })),
  ]);
  const [before, after] = data ? [data.prompts[0].baseline_logit_difference ?? null, data.prompts[0].logit_difference ?? null] : [null, null];
  return (
    <div class="page prompt-page">
      <h1 class="hidden">Prompt</h1>
      <section class="panel prompt-head" aria-label="Prompt">
        <Fields a={state.a} b={state.b} busy={asked.loading} onSwap={swap} onRun={(a, b) => { update({ a, b, trace: [], row: '', ...(b === null && { sort: { ...state.sort, side: 'A' } }) }, { push: true }); if (JSON.stringify([a, b]) === JSON.stringify([state.a, state.b])) asked.retry(); }} />
      </section>
      {empty ? <Welcome onPick={(a) => update({ a }, { push: true })} /> : !ready && !data ? <Unready lines={8} /> : (
        <>
          <Answer asked={asked} lines={3}>{(found) => <Verdict data={found} two={two} changed={changed} />}</Answer>
          {asked.error?.status === 422 && <p class="row"><button type="button" onClick={() => update({ ...initial(), a: state.a, b: state.b, tab: state.tab }, { push: true })}>Start afresh with {state.b ? 'these texts' : 'this text'}</button></p>}
          <Tray
            interventions={state.interventions} hasB={state.b !== null} before={changed ? before : null} after={changed ? after : null}
            tokens={data ? data.prompts[0].ids.map((/** @type {number} */ _, /** @type {number} */ i) => tokenAt(data.prompts[0].ids, data.vocab, i)) : []}
            onChange={change} onUndo={history.past.length ? () => step('past') : null} onRedo={history.future.length ? () => step('future') : null}
          />
          <Breadcrumb trace={state.trace} target={state.a.distractor.length ? 'Logit difference' : 'Logit of the target'} onTrace={(trace) => update({ trace, row: '' }, { push: true })} />
          <Tabs label="Views of the prompt" panel="view" at={state.tab} onChange={(tab) => update({ tab }, { push: true })} tabs={TABS.map((id, i) => ({ id, title: TAB_TEXT[id], keys: String(i + 1) }))} />
          <div id="view" role="tabpanel" aria-labelledby={`view-${state.tab}`} tabIndex={-1}>
            {state.tab === 'attention' && <Attention text={state.a.text} nLayers={model.value?.n_layers ?? 1} nHeads={model.value?.n_heads ?? 1} limit={model.value?.limits?.heads ?? 144} chosen={state.head} onChoose={(head) => update({ head })} />}
            {state.tab === 'lens' && <Lens text={state.a.text} length={data?.prompts[0].ids.length ?? null} most={model.value?.limits?.lens_positions ?? 64} />}
            {state.tab === 'generate' && <Generate text={state.a.text} sample={state.sample} most={model.value?.limits?.new_tokens ?? 128} interventions={interventionsBody(state, true)} onSample={(sample) => update({ sample })} />}
            {state.tab === 'matrix' && data && (
              <Panel id="matrix" title="Tokens × nodes" what="what each unit does at each token" json={data} python={data.python}>
                {state.position === 'all' ? <Matrix data={data} two={two} onPosition={(position) => update({ position, tab: 'nodes' })} /> : (
                  <Empty title="The nodes of one token are shown now"><p class="row"><button type="button" class="primary" onClick={() => update({ position: 'all' })}>Show the nodes of every token</button></p></Empty>
                )}
              </Panel>
            )}
            {state.tab === 'nodes' && data && (
              <div class={`split ${sideways ? 'over' : 'wide-left'}`}>
                <Panel id="nodes" title={state.trace.length ? 'Nodes before it' : 'Nodes'} what={partial ? <Progress data={data} /> : <Coverage data={data} traced={state.trace.length > 0} />} json={data} python={data.python}>
                  <Settings state={state} canCompare={changed && state.b === null} n={data.prompts[0].ids.length} update={update} shown={rows.length} />
                  <div class={asked.stale || old ? 'stale' : undefined} aria-busy={asked.loading}>
                    <NodeTable
                      data={table} rows={rows} sort={state.sort} open={state.row} current={row?.key ?? ''} two={sideways} sides={two ? ['A', 'B'] : ['now', 'before']}
                      onSort={(sort) => update({ sort })} onOpen={toggle} onCurrent={(one) => setCurrent(one.key)} onAblate={(one) => intervene(one.node, 'zero')} onTrace={traceRow}
                      detail={(one) => <Detail node={one.node} request={body} words={data} ids={data.prompts[0].ids} hasB={two} onChange={intervene} onTrace={traceFrom} />}
                    />
                  </div>
                </Panel>
                <div class="stack">
                  <Panel id="candidates" title="Next token" what="what the model says next" json={data.prompts.map((/** @type {any} */ one) => one.top_logits)} python={data.python}>
                    <Candidates data={data} two={two} onTarget={(text, role) => update({ a: { ...state.a, [role]: state.a[role].includes(text) ? state.a[role].filter((other) => other !== text) : [...state.a[role], text] } })} />
                  </Panel>
                  <Panel id="effects" title="Tokens" what="what each token contributes to the target, by kind of part" json={data.prompts.map((/** @type {any} */ one) => one.token_effects)} python={data.python}>
                    <TokenEffects data={data} two={two} position={state.position} onPosition={(position) => update({ position })} />
                  </Panel>
                </div>
              </div>
            )}
          </div>
        </>
      )}
    </div>
  );
}

/** How far a reply that comes in parts is. @param {{data: any}} props */
function Progress({ data: { part, nodes } }) {
  const layer = part?.layer ?? null;
  return <span role="status">{layer === null ? 'the model has run' : `layer ${layer + 1} of ${model.value.n_layers}`}; {plural(nodes.length, 'node')} so far. <kbd>Esc</kbd> stops</span>;
}

/** How much of the target the shown nodes explain. @param {{data: any, traced: boolean}} props */
function Coverage({ data, traced }) {
  const totals = data.totals?.direct;
  const share = data.coverage ?? (totals?.all ? totals.shown / totals.all : null);
  if (share === null) return <>{plural(data.nodes.length, 'node')}</>;
  const of = traced ? 'its value' : 'the target';
  // A share of nearly nothing says nothing: then the sums stand there.
  const text = share >= 0 && share <= 2 ? `they explain ${percentage(share)} of ${of} by their direct effects` : `their direct effects sum to ${fixed(totals.shown, 2)}, those of all nodes to ${fixed(totals.all, 2)}`;
  return <span data-coverage={share}>{plural(data.nodes.length, 'node')}; {text}</span>;
}

/** @param {{state: State, canCompare: boolean, n: number, shown: number, update: (patch: Partial<State>) => void}} props */
function Settings({ state, canCompare, n, shown, update }) {
  return (
    <div class="row settings">
      <label>MLP <select value={state.mlp} onChange={(event) => update({ mlp: /** @type {any} */ (event.currentTarget.value), row: '' })}><option value="neuron">neurons</option><option value="latent">latents</option></select></label>
      <label>Attention <select value={state.attention} onChange={(event) => update({ attention: /** @type {any} */ (event.currentTarget.value), row: '' })}><option value="head">heads</option><option value="pair">pairs of tokens</option><option value="latent">latents</option></select></label>
      <label>at <select value={String(state.position)} onChange={(event) => update({ position: event.currentTarget.value === 'all' ? 'all' : Number(event.currentTarget.value), row: '' })}>
        <option value="-1">the last token</option><option value="all">every token</option>
        {Array.from({ length: n }, (_, i) => <option value={String(i)}>token {i}</option>)}
      </select></label>
      <label>Top <select value={String(state.k)} onChange={(event) => update({ k: Number(event.currentTarget.value) })}>{[...new Set([5, 10, 20, 50, 100, 200, state.k])].sort((x, y) => x - y).map((k) => <option value={String(k)}>{k}</option>)}</select></label>
      {canCompare && <label><input type="checkbox" checked={state.beside} onChange={(event) => update({ beside: event.currentTarget.checked, ...(!event.currentTarget.checked && { sort: { ...state.sort, side: 'A' } }) })} /> beside the unchanged model</label>}
      <input type="search" aria-label="Filter nodes" placeholder="Filter, such as L3 head" value={state.filter} onInput={(event) => update({ filter: event.currentTarget.value })} />
      <span class="soft" role="status">{state.filter ? `${shown} shown` : ''}</span>
    </div>
  );
}

/** @param {{onPick: (a: import('../prompt/state.js').Prompt) => void}} props */
function Welcome({ onPick }) {
  return (
    <Empty title="What does the model do on a text?">
      <p>Give a text that ends before the word you care about, the word it should say (target) and one it should not (distractor). The parts of the model are then listed by what they do to the difference.</p>
      <p class="row"><button type="button" class="primary" onClick={() => onPick(example())}>Try an example</button></p>
    </Empty>
  );
}
