// Texts of one's own, and what the unit makes of them.
import { useEffect, useState } from 'preact/hooks';
import { post, url, useAsk } from '../api.js';
import { Panel, Tool } from '../components/panel.jsx';
import { Answer } from '../components/states.jsx';
import { Tokens } from '../components/tokens.jsx';
import { Unready } from '../components/unready.jsx';
import { number } from '../format.js';
import { setQuery } from '../router.js';
import { modelState } from '../state.js';
import { scaleOf } from './examples.jsx';

const MOST = 8; // texts in the address
const PAUSE = 250; // milliseconds after the last letter

/** @param {string | undefined} text @returns {string[]} */
export function parseTexts(text) {
  try {
    const found = JSON.parse(text ?? '[]');
    return Array.isArray(found) ? found.filter((one) => typeof one === 'string').slice(0, MOST) : [];
  } catch {
    return [];
  }
}

/** @param {{id: string, unit: number, card: import('./types.js').Card, query: Record<string, string>}} props */
export function TryIt({ id, unit, card, query }) {
  const kept = parseTexts(query.try);
  const [draft, setDraft] = useState('');
  const [typed, setTyped] = useState('');
  useEffect(() => {
    const timer = setTimeout(() => setTyped(draft), PAUSE);
    return () => clearTimeout(timer);
  }, [draft]);
  const texts = typed.trim() === '' ? kept : [typed, ...kept].slice(0, MOST);
  const state = modelState.value;
  const body = { texts, dictionary: id, units: [unit] };
  const asked = useAsk(state === 'ready' && texts.length ? JSON.stringify(body) : null, (abort) => post(url(['activations']), body, { signal: abort }), { delay: 60 });
  /** @param {string[]} next */
  const keep = (next) => setQuery({ try: next.length ? JSON.stringify(next) : null });
  function add() {
    if (draft.trim() === '' || kept.includes(draft)) return;
    keep([draft, ...kept].slice(0, MOST));
    setDraft('');
    setTyped('');
  }
  if (state === 'none') return null;
  return (
    <Panel
      id="try" title="Try a text" json={asked.data} python={asked.data?.python}
      what={`what this ${card.kind} makes of your own text; kept texts stay in the address and go along to the next one`}
    >
      <form class="try-form" onSubmit={(event) => { event.preventDefault(); add(); }}>
        <textarea
          id="try-text" rows={1} value={draft} aria-label="Text" placeholder="Type a text; Enter keeps it" maxLength={4000}
          onInput={(event) => setDraft(event.currentTarget.value)}
          onKeyDown={(event) => { if (event.key === 'Enter' && !event.shiftKey) { event.preventDefault(); add(); } }}
        />
        <button type="submit" disabled={draft.trim() === '' || kept.length >= MOST}>Keep</button>
      </form>
      {texts.length > 0 && (state === 'ready' ? (
        <Answer asked={asked} lines={texts.length}>
          {(/** @type {any} */ reply) => (
            <Results reply={reply} unit={unit} card={card} onDrop={(i) => keep(kept.filter((_, at) => at !== i - (texts.length - kept.length)))} firstKept={texts.length - kept.length} />
          )}
        </Answer>
      ) : <Unready />)}
    </Panel>
  );
}

/** @param {{reply: any, unit: number, card: import('./types.js').Card, onDrop: (i: number) => void, firstKept: number}} props */
function Results({ reply, unit, card, onDrop, firstKept }) {
  return (
    <ul class="try-list">
      {reply.texts.map((/** @type {any} */ text, /** @type {number} */ i) => {
        const acts = text.units.find((/** @type {any} */ one) => one.unit === unit)?.acts ?? [];
        const best = acts.reduce((/** @type {any} */ a, /** @type {any} */ b) => (Math.abs(b[1]) > Math.abs(a[1]) ? b : a), [-1, 0]);
        return (
          <li class="example">
            <div class="example-value"><span>{number(best[1])}</span><span class="soft small">{best[0] < 0 ? 'inactive' : 'largest'}</span></div>
            <Tokens ids={text.ids} acts={acts} words={reply} scale={Math.max(scaleOf(card), Math.abs(best[1]))} peak={best[0] < 0 ? undefined : best[0]} label={`Your text, largest value ${number(best[1])}`} />
            <div class="example-tools">{i >= firstKept && <Tool icon="close" label="Remove this text" onClick={() => onDrop(i)} />}</div>
          </li>
        );
      })}
    </ul>
  );
}
