// The texts that a unit is active on, by group.
import { useMemo, useState } from 'preact/hooks';
import { Panel } from '../components/panel.jsx';
import { Empty } from '../components/states.jsx';
import { Tabs } from '../components/tabs.jsx';
import { Scale, Tokens } from '../components/tokens.jsx';
import { number, plural } from '../format.js';
import { Pairs, pairQuery } from './pairs.jsx';

/** @typedef {import('./types.js').Card} Card */
/** @typedef {import('./types.js').Example} Example */
/** @typedef {import('./types.js').CardState} CardState */

/** The groups in the order of their tabs. @type {{id: string, title: string, groups: string[], what: string}[]} */
const TABS = [
  { id: 'top', title: 'Largest', groups: ['top'], what: 'the contexts with the largest values' },
  { id: 'bottom', title: 'Most negative', groups: ['bottom'], what: 'the contexts with the lowest values' },
  { id: 'stratum', title: 'By range', groups: ['stratum'], what: 'equal ranges of values from 0 to the largest' },
  { id: 'random', title: 'Random', groups: ['uniform'], what: 'drawn from all contexts where it is active' },
  { id: 'weighted', title: 'Weighted', groups: ['weighted'], what: 'drawn at random, larger values more often' },
  { id: 'inactive', title: 'Inactive', groups: ['inactive'], what: 'contexts where it is not active' },
];
const WIDTHS = [8, 16, 32];

/** The value that is highlighted most strongly. @param {Card} card */
export function scaleOf(card) {
  return Math.max(card.stats.max, card.signed ? -card.stats.min : 0);
}

/** @param {string | undefined} text @returns {[number, number] | null} */
export function parseRange(text) {
  const limits = (text ?? '').split('..').map(Number);
  return limits.length === 2 && limits.every(Number.isFinite) ? [limits[0], limits[1]] : null;
}

/** The token of the peak; of pairs, the one that looks. @param {Example} example */
export function tokenOfPeak(example) {
  return example.pairs ? pairQuery(example.peak) : example.peak;
}

/** Whether two examples show the same tokens around their peaks. @param {Example} example */
function around(example) {
  const at = tokenOfPeak(example);
  return example.ids.slice(Math.max(0, at - 8), at + 3).join(' ');
}

/** The examples that are shown. @param {Card} card @param {CardState} state */
export function shownExamples(card, state) {
  const range = parseRange(state.range);
  const tabs = TABS.filter((tab) => card.examples.some((example) => tab.groups.includes(example.group)));
  const tab = tabs.find((one) => one.id === state.group) ?? tabs[0];
  const seen = new Set();
  const found = card.examples.filter((example) => {
    if (range) {
      // The same place may be in several groups.
      if (example.value < range[0] || example.value >= range[1] || seen.has(`${example.start} ${example.peak}`)) return false;
      seen.add(`${example.start} ${example.peak}`);
      return true;
    }
    return tab?.groups.includes(example.group);
  });
  if (range) found.sort((a, b) => b.value - a.value);
  if (!state.dedupe) return { tabs, tab, range, found, hidden: 0 };
  const texts = new Set();
  const kept = found.filter((example) => {
    const text = around(example);
    if (texts.has(text)) return false;
    texts.add(text);
    return true;
  });
  return { tabs, tab, range, found: kept, hidden: found.length - kept.length };
}

/**
 * @param {{card: Card, state: CardState, onState: (patch: CardState) => void, promptLink?: (text: string) => string}} props
 */
export function Examples({ card, state, onState, promptLink }) {
  const { tabs, tab, range, found, hidden } = useMemo(() => shownExamples(card, state), [card, state.group, state.range, state.dedupe]);
  const width = WIDTHS.includes(Number(state.width)) ? Number(state.width) : null;
  const words = card;
  return (
    <Panel
      id="examples" title="Examples" class="examples" json={found} python={card.python}
      what={range ? `kept examples with a peak from ${number(range[0])} to ${number(range[1])}` : (tab?.what ?? 'the texts on which it is active')}
    >
      {card.examples.length === 0 ? (
        <Never card={card} />
      ) : (
        <>
          <div class="examples-bar">
            {range ? (
              <div class="row filter">
                <strong>Peaks from {number(range[0])} to {number(range[1])}</strong>
                <button type="button" onClick={() => onState({ range: undefined })}>Show all groups</button>
              </div>
            ) : (
              <Tabs
                label="Groups of examples" panel="examples-list" at={tab.id} onChange={(id) => onState({ group: id === tabs[0].id ? undefined : id })}
                tabs={tabs.map((one) => ({ id: one.id, title: one.title, count: card.examples.filter((example) => one.groups.includes(example.group)).length }))}
              />
            )}
            <span class="push row">
              <label class="small soft">
                <input type="checkbox" checked={!!state.dedupe} onChange={(event) => onState({ dedupe: event.currentTarget.checked ? '1' : undefined })} />
                no repeats
              </label>
              <label class="small soft">
                context
                <select value={width ?? ''} onChange={(event) => onState({ width: event.currentTarget.value || undefined })}>
                  <option value="">all</option>
                  {WIDTHS.map((n) => <option value={n}>±{n}</option>)}
                </select>
              </label>
            </span>
          </div>
          <div id="examples-list" role={range ? undefined : 'tabpanel'} aria-labelledby={range ? undefined : `examples-list-${tab.id}`}>
            {found.length === 0 && (
              <Empty title="No example was kept from this range">
                <p>The histogram counts every token; examples are a selection of them.</p>
                <p class="row"><button type="button" onClick={() => onState({ range: undefined })}>Show all groups</button></p>
              </Empty>
            )}
            <ol class="example-list">
              {found.map((example, i) => (
                <>
                  {!range && example.low !== null && (i === 0 || found[i - 1].interval !== example.interval) && (
                    <li class="range-head soft" key={`range-${example.interval}`}>{number(example.low)} to {number(example.high)}</li>
                  )}
                  <ExampleRow key={`${example.group}-${example.interval}-${example.rank}`} example={example} card={card} words={words} width={width} promptLink={promptLink} />
                </>
              ))}
            </ol>
            <p class="examples-foot small soft">
              <Scale scale={scaleOf(card)} signed={card.signed} />
              <span>{card.kind === 'head' ? 'how much the framed token looks at each token before it' : 'activation; the peak in bold'}</span>
              {hidden > 0 && <span class="push">{plural(hidden, 'repeat')} hidden</span>}
            </p>
          </div>
        </>
      )}
    </Panel>
  );
}

/** @param {{card: Card}} props */
function Never({ card }) {
  const dead = card.stats.count === 0;
  return (
    <Empty title={dead ? `This ${card.kind} was never active` : 'No examples were kept'}>
      <p>
        {dead
          ? `It was at 0 on all ${card.stats.n_tokens.toLocaleString('en-US')} tokens that were looked at. Other texts may still activate it.`
          : 'The store holds figures but no texts of it.'}
      </p>
    </Empty>
  );
}

/** @param {{example: Example, card: Card, words: Card, width: number | null, promptLink?: (text: string) => string}} props */
function ExampleRow({ example, card, words, width, promptLink }) {
  const [whole, setWhole] = useState(false);
  const at = tokenOfPeak(example);
  const cut = width !== null && !whole;
  const from = cut ? Math.max(0, at - width) : 0;
  const to = cut ? Math.min(example.ids.length, at + Math.ceil(width / 2) + 1) : example.ids.length;
  const text = example.ids.slice(0, to).map((id) => words.vocab[id] ?? '').join('');
  const link = promptLink?.(text);
  const label = `Example, peak ${number(example.value)}, document ${example.document}`;
  return (
    <li class="example" data-value={example.value}>
      <div class="example-value">
        <span>{number(example.value)}</span>
        <span class="soft small" title="document and place of the first token">{example.document}:{example.position}</span>
      </div>
      {example.pairs ? (
        <Pairs example={example} words={words} scale={scaleOf(card)} label={label} />
      ) : (
        <Tokens ids={example.ids} acts={example.acts} words={words} scale={scaleOf(card)} peak={example.peak} label={label} from={from} to={to} />
      )}
      <div class="example-tools">
        {width !== null && (from > 0 || to < example.ids.length || whole) && (
          <button type="button" class="plain small" onClick={() => setWhole(!whole)}>{whole ? 'less' : 'more'}</button>
        )}
        {link && <a class="small send" href={link} aria-label={`Send this example to the Prompt page, peak ${number(example.value)}`}>prompt</a>}
      </div>
    </li>
  );
}
