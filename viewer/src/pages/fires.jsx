// Which units of a dictionary are active on each token of a text.
import { useEffect, useMemo, useState } from 'preact/hooks';
import { post, url, useAsk } from '../api.js';
import { Panel } from '../components/panel.jsx';
import { Answer, Empty } from '../components/states.jsx';
import { Unready } from '../components/unready.jsx';
import { Tokens } from '../components/tokens.jsx';
import { Unit } from '../feature/side.jsx';
import { fixed } from '../format.js';
import { href, setQuery } from '../router.js';
import { modelState } from '../state.js';
import { tokenText } from '../vocabulary.js';

const TOP = 10;

/** @param {{one: any, query: Record<string, string>}} props */
export function FiresHere({ one, query }) {
  const [draft, setDraft] = useState(query.text ?? '');
  useEffect(() => setDraft(query.text ?? ''), [query.text]);
  const state = modelState.value;
  const body = { texts: [query.text ?? ''], dictionary: one.id, top_k: TOP };
  const asked = useAsk(state === 'ready' && query.text ? JSON.stringify(body) : null, (abort) => post(url(['activations']), body, { signal: abort }));
  if (state === 'none') return null;
  return (
    <Panel id="fires" title="Which fire on a text" what={`the ${TOP} strongest ${one.kind}s at each token of a text of yours`} json={asked.data} python={asked.data?.python}>
      <form class="try-form" onSubmit={(event) => { event.preventDefault(); setQuery({ text: draft, token_at: null }, { push: true }); }}>
        <textarea
          id="fires-text" rows={1} value={draft} aria-label="Text" placeholder="Type a text; Enter asks" maxLength={4000} onInput={(event) => setDraft(event.currentTarget.value)}
          onKeyDown={(event) => { if (event.key === 'Enter' && !event.shiftKey) { event.preventDefault(); setQuery({ text: draft, token_at: null }, { push: true }); } }}
        />
        <button type="submit" disabled={draft.trim() === ''}>Ask</button>
      </form>
      {query.text && (state === 'ready' ? <Answer asked={asked} lines={4}>{(reply) => <Found one={one} reply={reply} at={query.token_at} />}</Answer> : <Unready />)}
    </Panel>
  );
}

/** @param {{one: any, reply: any, at: string | undefined}} props */
function Found({ one, reply, at }) {
  const text = reply.texts[0];
  /** @type {{unit: number, value: number, label?: string}[][]} */
  const tokens = text?.tokens ?? [];
  const values = useMemo(() => Float64Array.from(tokens, (units) => Math.max(0, ...units.map((one) => Math.abs(one.value)))), [reply]);
  const place = at === undefined ? tokens.length - 1 : Math.min(Number(at) || 0, tokens.length - 1);
  const units = tokens[place] ?? [];
  if (!text?.ids.length) return <Empty title="This text has no tokens" />;
  return (
    <div class="fires">
      <Tokens ids={text.ids} values={values} words={reply} scale={Math.max(...values, 1e-9)} label="Your text; choose a token" picked={place} onPick={(token) => setQuery({ token_at: token })} />
      {units.length === 0 ? (
        <Empty title="Nothing is active on this token" />
      ) : (
        <table class="list">
          <caption class="small soft">at <code class="word">{tokenText(text.ids[place], reply)}</code></caption>
          <thead><tr><th scope="col">{one.kind}</th><th scope="col" class="num">activation</th></tr></thead>
          <tbody>{units.map((unit) => <tr key={unit.unit}><th scope="row"><Unit link={href(['f', one.id, unit.unit])} unit={unit.unit} label={unit.label} /></th><td class="num">{fixed(unit.value)}</td></tr>)}</tbody>
        </table>
      )}
    </div>
  );
}
