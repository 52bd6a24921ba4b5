// The feature card alone: in exported files, which open from file://, and in notebooks (the contract of
// anywidget: `render({ model, el })`). It asks no server for anything.
import { render as draw } from 'preact';
import { useState } from 'preact/hooks';
import { Icon } from './components/icons.jsx';
import { Notices } from './components/notices.jsx';
import { HasLinks, Panel } from './components/panel.jsx';
import { VirtualTable } from './components/table.jsx';
import { Badges, Facts, FeatureCard, titleOf } from './feature/card.jsx';
import { LABELS_ARE, LabelList } from './feature/label-list.jsx';
import { count, number, percentage, visible } from './format.js';

/**
 * @typedef {object} Exported
 * @property {import('./feature/types.js').Card} card
 * @property {any} logits null where the model was not asked
 * @property {string} name of the store
 * @property {Record<string, string>} links addresses of other exported units, by number; `index` of the list
 *
 * @typedef {object} Index
 * @property {{name: string, about: string, kind: string, rows: [number, number, number, number, string][]}} index
 */

/** @param {any} data */
const there = (data) => ({ data, error: undefined, loading: false, stale: false, retry: () => {}, cancel: () => {} });

/**
 * @param {{data: Exported, onUnit?: (unit: number) => void}} props
 * onUnit: who can show another unit, in a notebook
 */
function Page({ data, onUnit }) {
  const { card, logits, links } = data;
  const [state, setState] = useState(/** @type {import('./feature/types.js').CardState} */ ({}));
  const label = card.labels[0];
  /** @param {number | null} unit @param {'left' | 'right'} icon @param {string} text */
  const step = (unit, icon, text) => {
    if (unit === null) return null;
    if (onUnit) return <button type="button" class="tool" aria-label={text} title={text} onClick={() => onUnit(unit)}><Icon name={icon} /></button>;
    return links[unit] && <a class="tool" href={links[unit]} aria-label={text} title={text}><Icon name={icon} /></a>;
  };
  return (
    <HasLinks.Provider value={false}>
      <header class="feature-head">
        <p class="feature-nav row">
          {links.index ? <a href={links.index}>{data.name}</a> : <span class="soft">{data.name}</span>}
          <span class="soft">{card.location}</span>
          {step(card.prev_alive, 'left', 'The one before that is alive')}
          {step(card.next_alive, 'right', 'Next one that is alive')}
        </p>
        <h1>{titleOf(card)}<Badges badges={card.badges} /></h1>
        <p class="feature-label">{label ? visible(label.text) : <span class="soft">no label yet</span>}</p>
        <Facts card={card} />
      </header>
      <FeatureCard
        card={card} state={state} onState={(patch) => setState((old) => ({ ...old, ...patch }))} linkTo={(_, unit) => links[unit]}
        logits={logits ? there(logits) : undefined}
        labels={card.labels.length > 0 && <Panel id="labels" title="Explanations" what={LABELS_ARE} json={card.labels}><LabelList labels={card.labels} /></Panel>}
      />
      <Notices />
    </HasLinks.Provider>
  );
}

/** The list of all exported units. @param {Index} props */
function List({ index }) {
  const [text, setText] = useState('');
  const [sort, setSort] = useState({ by: 'density', order: /** @type {'asc' | 'desc'} */ ('desc') });
  const columns = ['unit', 'density', 'max', 'mean'];
  const words = text.toLowerCase().split(/\s+/);
  const rows = index.rows.filter((row) => words.every((word) => row[4].toLowerCase().includes(word) || String(row[0]) === word));
  const by = columns.indexOf(sort.by);
  rows.sort((a, b) => (sort.order === 'asc' ? 1 : -1) * (Number(a[by]) - Number(b[by])) || a[0] - b[0]);
  return (
    <>
      <h1>{index.name}</h1>
      <p class="lead soft">{index.about}</p>
      <section class="panel">
        <div class="panel-body">
          <input type="search" class="filter-field" aria-label="Search" placeholder="a number, or words of labels and texts" value={text} onInput={(event) => setText(event.currentTarget.value)} />
          <p class="small soft" role="status">{count(rows.length)} of {count(index.rows.length)}</p>
          <VirtualTable
            label={`Units of ${index.name}`} total={rows.length} row={(i) => rows[i]} sort={sort} resetKey={JSON.stringify([text, sort])}
            onSort={(id) => setSort({ by: id, order: sort.by === id && sort.order === 'desc' ? 'asc' : 'desc' })}
            columns={[
              { id: 'unit', title: index.kind, width: '72px', sorts: true, cell: (row) => <a href={`${row[0]}.html`}>{row[0]}</a> },
              { id: 'text', title: 'label, or where it is strongest', width: 'minmax(0, 1fr)', cell: (row) => <span class="one-line">{visible(row[4])}</span> },
              { id: 'density', title: 'active', width: '72px', num: true, sorts: true, cell: (row) => percentage(row[1]) },
              { id: 'max', title: 'largest', width: '72px', num: true, sorts: true, cell: (row) => number(row[2]) },
              { id: 'mean', title: 'mean', width: '72px', num: true, sorts: true, cell: (row) => number(row[3]) },
            ]}
          />
        </div>
      </section>
    </>
  );
}

/** Draw an exported page: its data stand in the element `data`. */
export function mount() {
  const data = JSON.parse(document.getElementById('data')?.textContent ?? '{}');
  const root = /** @type {HTMLElement} */ (document.getElementById('card'));
  draw(data.index ? <List index={data.index} /> : <Page data={data} />, root);
}

/**
 * Draw the card of a widget. Its trait `data` is an {@link Exported} and `unit` the number that is wanted.
 * @param {{model: any, el: HTMLElement}} props
 */
export function render({ model, el }) {
  const root = document.createElement('div');
  root.className = 'nx notebook';
  el.append(root);
  /** @param {number} unit */
  function onUnit(unit) {
    model.set('unit', unit);
    model.save_changes();
  }
  const show = () => draw(<Page data={model.get('data')} onUnit={onUnit} />, root);
  model.on('change:data', show);
  show();
  return () => {
    model.off('change:data', show);
    draw(null, root);
  };
}
