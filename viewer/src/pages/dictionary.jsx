// `#/d`: all dictionaries. `#/d/{dictionary}`: one of them, its units as a table, and where it comes from.
import { useState } from 'preact/hooks';
import { forget, send, url, useGet } from '../api.js';
import { useDraft } from '../components/draft.js';
import { Figures } from '../components/figures.jsx';
import { Histogram } from '../components/histogram.jsx';
import { notify } from '../components/notice.js';
import { Panel, Tool } from '../components/panel.jsx';
import { Answer, Empty, Failure, Loading } from '../components/states.jsx';
import { VirtualTable } from '../components/table.jsx';
import { Tokens } from '../components/tokens.jsx';
import { allAsCsv, save, useRows } from '../dictionary-rows.js';
import { Unit } from '../feature/side.jsx';
import { count, fixed, number, percentage, plural, visible } from '../format.js';
import { useKeys, walk } from '../keys.js';
import { go, href, setQuery } from '../router.js';
import { dictionaries, model } from '../state.js';
import { NotShown } from './astray.jsx';
import { FiresHere } from './fires.jsx';
import { DecoderMap } from './map.jsx';

// --- all ---

export function DictionariesPage() {
  const all = dictionaries.value;
  const marks = useGet(url(['bookmarks']));
  if (!model.value) return <div class="page"><Loading lines={8} /></div>;
  return (
    <div class="page">
      <h1>Dictionaries</h1>
      <p class="lead soft">{plural(all.length, 'store')} of examples{model.value.name ? ` of ${model.value.name}` : ''}; each row opens the table of its units.</p>
      <div class="stack">
        <Panel id="dictionaries" title="Stores" what="what was collected: latents of autoencoders, neurons, channels or heads of the model" json={all} python={model.value.stores_python}>
          <div class="scroll" tabIndex={0} role="group" aria-label="Stores">
            <table class="list wide-list">
              <thead>
                <tr><th scope="col">name</th><th scope="col">units</th><th scope="col">location</th><th scope="col" class="num">number</th><th scope="col" class="num">alive</th><th scope="col" class="num">dead</th><th scope="col" class="num">dense</th></tr>
              </thead>
              <tbody>
                {all.map((one) => (
                  <tr key={one.id}>
                    <th scope="row"><a href={href(['d', one.id])}>{one.name}</a></th>
                    <td class="text">{one.kind}s</td><td class="text">{one.location}</td><td class="num">{count(one.n)}</td>
                    <td class="num">{percentage(one.n_alive / Math.max(one.n, 1))}</td><td class="num">{count(one.n_dead)}</td><td class="num">{count(one.n_dense)}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        </Panel>
        <Panel id="bookmarks" title="Bookmarks" what="units that you have marked with the key b" json={marks.data}>
          <Answer asked={marks} lines={2}>{(reply) => <Bookmarks items={reply.items ?? []} />}</Answer>
        </Panel>
        <LabelFiles />
      </div>
    </div>
  );
}

/** @param {{items: any[]}} props */
function Bookmarks({ items }) {
  if (!items.length) return <Empty title="No bookmarks yet"><p>On the page of a feature, <kbd>b</kbd> keeps it here.</p></Empty>;
  return (
    <ul class="bookmarks">
      {items.map((one) => (
        <li><Unit link={href(['f', one.dictionary, one.unit])} unit={one.unit} label={one.label ?? one.note} place={one.dictionary} /></li>
      ))}
    </ul>
  );
}

/** Labels as files, in and out. */
function LabelFiles() {
  const [said, setSaid] = useState(/** @type {any} */ (null));
  const [into, setInto] = useState('');
  /** @param {File | undefined} file */
  async function read(file) {
    if (!file) return;
    try {
      const reply = await send('POST', url(['labels', 'import'], { dictionary: into }), { body: await file.text(), raw: true, headers: { 'content-type': 'application/x-ndjson' } });
      setSaid(await reply.json());
      forget('api/v1/');
    } catch (error) {
      notify(error instanceof Error ? error.message : String(error), 'bad');
    }
  }
  return (
    <Panel id="label-files" title="Labels as files" what="your own as JSON lines; those of others, such as the published explanations or Neuronpedia's, are read too">
      <p class="row">
        <a class="button" href={url(['labels', 'export'])} download="labels.jsonl">Save as JSON lines</a>
        <a class="button" href={url(['labels', 'export'], { format: 'neuronpedia' })} download="labels-neuronpedia.jsonl">Save for Neuronpedia</a>
      </p>
      {!model.value?.read_only && (
        <p class="row spaced">
          <label>Read into
            <select value={into} onChange={(event) => setInto(event.currentTarget.value)}>
              <option value="">what each line says</option>
              {dictionaries.value.map((one) => <option value={one.id}>{one.name}</option>)}
            </select>
          </label>
          <input type="file" accept=".jsonl,.json,.txt" aria-label="File of labels" onChange={(event) => read(event.currentTarget.files?.[0])} />
        </p>
      )}
      {said && (
        <div class="spaced" role="status">
          <p>{plural(said.imported, 'label')} read{said.skipped > 0 && `, ${plural(said.skipped, 'line')} left out`}.</p>
          {said.errors?.length > 0 && <ul class="small soft">{said.errors.slice(0, 5).map((/** @type {any} */ one) => <li>line {one.line}: {one.detail}</li>)}</ul>}
        </div>
      )}
    </Panel>
  );
}

// --- one ---

const SORTS = ['unit', 'density', 'max', 'mean', 'score'];

/** The query of the table, as the server wants it. @param {Record<string, string>} query */
function tableQuery({ sort, order, from, to, show, q, token }) {
  return {
    sort: SORTS.includes(sort) ? sort : 'density',
    order: order === 'asc' ? 'asc' : 'desc',
    density_min: show === 'dense' ? 0.1 : exponent(from),
    density_max: exponent(to),
    alive: show === 'all' ? undefined : show === 'dead' ? false : true,
    q: q || undefined,
    token: token || undefined,
  };
}

/** @param {string | undefined} text */
function exponent(text) {
  return text === undefined || !Number.isFinite(Number(text)) ? undefined : 10 ** Number(text);
}

/** @param {{path: string[], query: Record<string, string>}} props */
export function DictionaryPage({ path, query }) {
  const id = path[0];
  const asked = useGet(url(['dictionaries', id]));
  if (asked.error) return <div class="page"><NotShown problem={asked.error} retry={asked.retry} id={id} page="d" /></div>;
  if (!asked.data || asked.data.id !== id) return <div class="page"><Loading lines={12} /></div>;
  return <One key={id} one={asked.data} query={query} />;
}

/** @param {{one: any, query: Record<string, string>}} props */
function One({ one, query }) {
  useKeys('Dictionary', [
    { keys: 'j', what: 'Next row', run: () => walk('.vbody a.unit-link', 1) },
    { keys: 'k', what: 'Row before', run: () => walk('.vbody a.unit-link', -1) },
    { keys: 't', what: 'Which units fire on a text', run: () => document.getElementById('fires-text')?.focus() },
    { keys: 'ArrowUp', what: 'The dictionary a layer up', run: () => one.next_layer && go(href(['d', one.next_layer], query)) },
    { keys: 'ArrowDown', what: 'The dictionary a layer down', run: () => one.prev_layer && go(href(['d', one.prev_layer], query)) },
  ]);
  const range = query.from !== undefined && query.to !== undefined ? /** @type {[number, number]} */ ([Number(query.from), Number(query.to)]) : null;
  return (
    <div class="page">
      <div class="feature-nav">
        <select aria-label="Dictionary" value={one.id} onChange={(event) => go(href(['d', event.currentTarget.value]))}>
          {dictionaries.value.map((other) => <option value={other.id}>{other.name}</option>)}
        </select>
        <span class="push row tight">
          <Tool icon="down" label="A layer down" keys="↓" disabled={!one.prev_layer} onClick={() => go(href(['d', one.prev_layer], query))} />
          <Tool icon="up" label="A layer up" keys="↑" disabled={!one.next_layer} onClick={() => go(href(['d', one.next_layer], query))} />
        </span>
      </div>
      <h1>{one.name}</h1>
      <p class="lead soft">{one.kind}s at {one.location}, looked at on {count(one.n_tokens)} tokens</p>
      <Figures items={[
        [`${one.kind}s`, count(one.n)],
        ['alive', count(one.n_alive), percentage(one.n_alive / Math.max(one.n, 1))],
        ['never active', count(one.n_dead), percentage(one.n_dead / Math.max(one.n, 1))],
        ['dense', count(one.n_dense), 'on a tenth of tokens or more'],
        ...QUALITY.filter(([name]) => typeof one.metrics?.[name] === 'number').map(([name, title, remark]) => /** @type {[string, string, string]} */ ([title, number(one.metrics[name]), remark])),
      ]} />
      <div class="card-grid">
        <div class="card-main">
          <Units one={one} query={query} />
          <FiresHere one={one} query={query} />
        </div>
        <div class="card-side">
          <Panel id="density" title="How often they are active" what="units by the share of tokens on which they are active; choose bars to narrow the table" json={one.density_hist} python={one.python}>
            {one.density_hist.counts.some((/** @type {number} */ n) => n > 0) ? (
              <Histogram
                bins={trimmed(one.density_hist)} edges="exponents" label="Units by density" range={range}
                onRange={(next) => setQuery({ from: next ? next[0] : null, to: next ? next[1] : null })} linear
              />
            ) : (
              <Empty title="No unit was ever active" />
            )}
          </Panel>
          <MapPanel one={one} />
          <Panel id="provenance" title="Where it comes from" what="names, hashes and versions that the store has recorded" json={{ provenance: one.provenance, settings: one.settings }} python={one.python}>
            <Provenance value={one.provenance} />
          </Panel>
        </div>
      </div>
    </div>
  );
}

/** What is shown of the metrics that a dictionary comes with. @type {[string, string, string][]} */
const QUALITY = [
  ['l0', 'L0', 'active at once, on average'],
  ['fvu', 'FVU', 'share of variance that is not explained'],
  ['loss_recovered_zero', 'loss recovered', '1: the model predicts as well as without it'],
];

/** Without the empty bins at both ends. @param {import('../components/histogram.jsx').Bins} bins */
function trimmed({ edges, counts }) {
  const first = counts.findIndex((n) => n > 0);
  const last = counts.findLastIndex((n) => n > 0);
  return { edges: edges.slice(first, last + 2), counts: counts.slice(first, last + 1) };
}

/** @param {{one: any, query: Record<string, string>}} props */
function Units({ one, query }) {
  const asked = tableQuery(query);
  const rows = useRows(one.id, asked);
  const [progress, setProgress] = useState(/** @type {number | null} */ (null));
  /** @param {string} id */
  function sortBy(id) {
    const desc = asked.sort === id ? asked.order === 'asc' : id !== 'unit';
    setQuery({ sort: id === 'density' ? null : id, order: desc ? null : 'asc' });
  }
  async function download() {
    setProgress(0);
    try {
      save(`${one.id}.csv`, await allAsCsv(one.id, asked, setProgress), 'text/csv');
    } catch (error) {
      notify(error instanceof Error ? error.message : String(error), 'bad');
    }
    setProgress(null);
  }
  /** @type {import('../components/table.jsx').Column[]} */
  const columns = [
    { id: 'unit', title: one.kind, width: '64px', sorts: true, cell: ({ row }) => <a class="unit-link" href={href(['f', one.id, row.unit])}>{row.unit}</a> },
    { id: 'label', title: 'label, or where it is strongest', width: 'minmax(0, 1fr)', cell: ({ row, words }) => <Peek row={row} words={words} /> },
    { id: 'density', title: 'active', width: '62px', num: true, sorts: true, cell: ({ row }) => percentage(row.density) },
    { id: 'max', title: 'largest', width: '62px', num: true, sorts: true, cell: ({ row }) => number(row.max) },
    { id: 'mean', title: 'mean', width: '56px', num: true, sorts: true, cell: ({ row }) => number(row.mean) },
  ];
  // Few stores come with scored labels.
  if (rows.row(0)?.score !== null && rows.row(0)) columns.push({ id: 'score', title: 'score', width: '56px', num: true, sorts: true, cell: ({ row }) => (row.score === null ? '' : fixed(row.score, 2)) });
  const filtered = query.from !== undefined || query.q || query.token || query.show;
  return (
    <Panel
      id="units" title="Units" json={() => ({ query: asked, items: rows.all() })} python={rows.python}
      what={rows.total === null ? 'one row for each' : `${count(rows.total)} of ${count(one.n)}`}
      actions={<button type="button" class="small" disabled={progress !== null} onClick={download}>{progress === null ? 'CSV' : percentage(progress)}</button>}
    >
      <div class="units-bar">
        <Field name="q" value={query.q} label="Search labels" placeholder="words of labels" />
        <Field name="token" value={query.token} label="Search tokens" placeholder="a token: “ king”" />
        <select aria-label="Which units" value={query.show ?? ''} onChange={(event) => setQuery({ show: event.currentTarget.value || null, from: null, to: null })}>
          <option value="">alive</option><option value="dense">dense</option><option value="dead">never active</option><option value="all">all</option>
        </select>
        <button type="button" class="plain" disabled={!filtered} onClick={() => setQuery({ from: null, to: null, q: null, token: null, show: null })}>Reset</button>
      </div>
      {rows.problem && rows.total === null ? (
        <Failure problem={rows.problem} retry={rows.retry} />
      ) : rows.total === 0 ? (
        <Empty title="No unit is like that"><p class="row"><button type="button" onClick={() => setQuery({ from: null, to: null, q: null, token: null, show: null })}>Show all that are alive</button></p></Empty>
      ) : (
        <VirtualTable
          label={`Units of ${one.name}`} columns={columns} total={rows.total ?? 15} stale={rows.stale} resetKey={JSON.stringify(asked)}
          row={(i) => { const row = rows.row(i); return row && { row, words: rows.words(i) }; }}
          onView={rows.want} sort={{ by: asked.sort, order: /** @type {'asc' | 'desc'} */ (asked.order) }} onSort={sortBy}
        />
      )}
      {rows.problem && rows.total !== null && <Failure problem={rows.problem} retry={rows.retry} />}
    </Panel>
  );
}

/** A field that is part of the address. @param {{name: string, value: string | undefined, label: string, placeholder: string}} props */
function Field({ name, value = '', label, placeholder }) {
  const [text, setText] = useDraft(value, (next) => setQuery({ [name]: next || null }), 250);
  return <input type="search" class="grow" aria-label={label} placeholder={placeholder} maxLength={200} value={text} onInput={(event) => setText(event.currentTarget.value)} />;
}

/** @param {{row: any, words: import('../vocabulary.js').Vocabulary}} props */
function Peek({ row, words }) {
  if (row.label) return <span class="one-line">{visible(row.label)}</span>;
  if (!row.peek) return <span class="soft">never active</span>;
  return (
    <div class="one-line peek">
      <Tokens
        ids={row.peek.ids} acts={row.peek.acts} words={words} scale={Math.max(row.max, ...row.peek.acts.map((/** @type {[number, number]} */ act) => Math.abs(act[1])))}
        peak={row.peek.peak} label={`Where ${row.unit} is strongest`} from={Math.max(0, row.peek.peak - 4)} to={Math.min(row.peek.ids.length, row.peek.peak + 9)} still
      />
    </div>
  );
}

/** @param {{one: any}} props */
function MapPanel({ one }) {
  const asked = useGet(one.map ? url(['dictionaries', one.id, 'map']) : null, { delay: 100 });
  if (!one.map) return null;
  return (
    <Panel id="map" title="Map" what="decoder rows by their first two principal components; a click opens a unit" json={asked.data} python={asked.data?.python}>
      <Answer asked={asked} lines={10}>{(points) => <DecoderMap points={points} kind={one.kind} onPick={(unit) => go(href(['f', one.id, unit]))} />}</Answer>
    </Panel>
  );
}

/** Names and values, also of values within values. @param {{value: any}} props */
function Provenance({ value }) {
  const entries = Object.entries(value ?? {});
  if (!entries.length) return <Empty title="Nothing was recorded" />;
  return (
    <dl class="provenance">
      {entries.map(([name, part]) => (
        <div key={name}>
          <dt>{name.replace(/_/g, ' ')}</dt>
          <dd>{part !== null && typeof part === 'object' ? <code>{JSON.stringify(part)}</code> : /^[0-9a-f]{32,}$/.test(String(part)) ? <code title={String(part)}>{String(part).slice(0, 12)}…</code> : String(part)}</dd>
        </div>
      ))}
    </dl>
  );
}
