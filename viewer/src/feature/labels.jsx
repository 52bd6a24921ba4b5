// What is said about a unit, by whom, and how well it predicts it; and saying so oneself.
import { useEffect, useRef, useState } from 'preact/hooks';
import { Problem, send, url } from '../api.js';
import { Icon } from '../components/icons.jsx';
import { notify } from '../components/notice.js';
import { Panel } from '../components/panel.jsx';
import { Empty, Failure } from '../components/states.jsx';
import { model } from '../state.js';
import { Explain } from './explain.jsx';
import { LABELS_ARE, LabelList } from './label-list.jsx';

const MINE = 'user';

/** @param {{id: string, card: import('./types.js').Card, onChange: () => void}} props */
export function Labels({ id, card, onChange }) {
  const mine = card.labels.find((label) => label.editable && label.source === MINE);
  const [text, setText] = useState(/** @type {string | null} */ (null));
  const [problem, setProblem] = useState(/** @type {Problem | null} */ (null));
  const [etag, setEtag] = useState('');
  const address = url(['dictionaries', id, 'features', card.unit, 'labels']);
  const editable = !model.value?.read_only;
  const field = useRef(/** @type {HTMLTextAreaElement | null} */ (null));
  useEffect(() => field.current?.focus(), [text !== null]); // the attribute autofocus works once a page

  async function begin() {
    setProblem(null);
    try {
      // Whoever writes says which state they have read, so that nobody's words are lost.
      const reply = await send('GET', address);
      setEtag(reply.headers.get('etag') ?? '');
      setText(mine?.text ?? '');
    } catch (error) {
      fail(error);
    }
  }
  /** @param {unknown} error */
  function fail(error) {
    if (!(error instanceof Problem)) throw error;
    setProblem(error);
  }
  /** @param {string} wanted */
  async function save(wanted) {
    try {
      const headers = etag ? { 'if-match': etag } : undefined;
      if (wanted.trim() === '') await send('DELETE', url(['dictionaries', id, 'features', card.unit, 'labels'], { source: MINE }), { headers });
      else await send('PUT', address, { headers, body: { text: wanted, source: MINE } });
      setText(null);
      setProblem(null);
      notify(wanted.trim() === '' ? 'Label removed' : 'Label saved');
      onChange();
    } catch (error) {
      fail(error);
    }
  }
  return (
    <Panel
      id="labels" title="Explanations" what={LABELS_ARE} json={card.labels} python={card.python}
      actions={editable && text === null && (
        <button type="button" class="tool" data-edit-label aria-label="Edit your label" title="Edit your label (e)" onClick={begin}><Icon name="pencil" /></button>
      )}
    >
      {text !== null && (
        <form class="label-form" onSubmit={(event) => { event.preventDefault(); save(text); }}>
          <textarea
            ref={field} rows={2} value={text} aria-label="Your label" maxLength={2000} placeholder="What does it respond to?"
            onInput={(event) => setText(event.currentTarget.value)}
            onKeyDown={(event) => {
              if (event.key === 'Escape') { event.stopPropagation(); setText(null); }
              if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) save(text);
            }}
          />
          <p class="row">
            <button type="submit" class="primary">Save</button>
            <button type="button" onClick={() => { setText(null); setProblem(null); }}>Cancel</button>
            {mine && <button type="button" class="plain" onClick={() => save('')}>Remove</button>}
          </p>
        </form>
      )}
      {problem && <Failure problem={problem} retry={problem.status === 412 ? () => { onChange(); begin(); } : undefined} />}
      {card.labels.length === 0 && text === null && <Empty title="Nobody has said what it means"><p>{editable ? 'The pencil above, or the key e, lets you say it.' : 'This server takes no labels.'}</p></Empty>}
      <LabelList labels={card.labels} />
      {editable && card.kind !== 'head' && card.stats.count > 0 && <Explain id={id} unit={card.unit} onDone={onChange} />}
    </Panel>
  );
}
