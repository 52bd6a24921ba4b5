// The texts to look at: one prompt or two, each with the tokens that are told apart.
import { useEffect, useRef, useState } from 'preact/hooks';
import { Problem, post, url } from '../api.js';
import { Icon } from '../components/icons.jsx';
import { Tool } from '../components/panel.jsx';
import { visible } from '../format.js';
import { prompt } from './state.js';

/** @typedef {import('./state.js').Prompt} Prompt */

/**
 * @param {{a: Prompt, b: Prompt | null, onRun: (a: Prompt, b: Prompt | null) => void, onSwap: () => void, busy: boolean}} props
 */
export function Fields({ a, b, onRun, onSwap, busy }) {
  const [draft, setDraft] = useState({ a, b });
  const committed = JSON.stringify([a, b]);
  const shown = useRef(committed); // what is typed before the first effects run stays
  useEffect(() => {
    if (shown.current !== committed) setDraft({ a, b });
    shown.current = committed;
  }, [committed]);
  const changed = JSON.stringify([draft.a, draft.b]) !== committed;
  const run = (/** @type {{a: Prompt, b: Prompt | null}} */ next) => onRun(next.a, next.b);

  return (
    <form
      class="fields"
      onSubmit={(event) => { event.preventDefault(); run(draft); }}
      onKeyDown={(event) => {
        if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
          event.preventDefault();
          event.stopPropagation();
          run(draft);
        }
      }}
    >
      <header class="row">
        <h2>Prompt</h2>
        {changed && <span class="soft">not run yet</span>}
        <span class="push" />
        {draft.b ? (
          <>
            <button type="button" onClick={onSwap}>Swap A and B</button>
            <button type="button" onClick={() => run({ ...draft, b: null })}>Remove B</button>
          </>
        ) : (
          <button type="button" onClick={() => setDraft({ ...draft, b: prompt(draft.a.text) })}><Icon name="plus" /> Second prompt</button>
        )}
        <button type="submit" class={changed ? 'primary' : ''} disabled={!draft.a.text}><Icon name="play" /> {busy ? 'Running …' : 'Run'} <kbd>Ctrl</kbd><kbd>↵</kbd></button>
      </header>
      <div class={`prompts${draft.b ? ' two' : ''}`}>
        <Field name={draft.b ? 'Prompt A' : 'Prompt'} id="a" value={draft.a} onText={(text) => setDraft({ ...draft, a: { ...draft.a, text } })} onTokens={(next) => run({ ...draft, a: next })} />
        {draft.b && (
          <Field name="Prompt B" id="b" value={draft.b} otherwise={draft.a} onText={(text) => setDraft({ ...draft, b: { .../** @type {Prompt} */ (draft.b), text } })} onTokens={(next) => run({ ...draft, b: next })} />
        )}
      </div>
    </form>
  );
}

/**
 * @param {{name: string, id: string, value: Prompt, otherwise?: Prompt, onText: (text: string) => void, onTokens: (next: Prompt) => void}} props
 */
function Field({ name, id, value, otherwise, onText, onTokens }) {
  const rows = Math.min(6, 1 + value.text.split('\n').reduce((n, line) => n + Math.ceil((line.length + 1) / 70), 0));
  const ends = /\s$/.test(value.text);
  return (
    <fieldset class="prompt-field">
      <legend class={otherwise || name !== 'Prompt' ? '' : 'hidden'}>{name}</legend>
      <textarea id={`text-${id}`} aria-label={`Text of ${name}`} rows={Math.max(2, rows)} spellcheck={false} value={value.text} onInput={(event) => onText(event.currentTarget.value)} />
      {ends && <p class="hint">The text ends with a space. Most models begin a word with the space, so the next word would have none.</p>}
      <div class="sets">
      <TokenSet label="Target" name={name} tokens={value.target} inherited={otherwise?.target} text={value.text} onChange={(target) => onTokens({ ...value, target })} />
      <TokenSet label="Distractor" name={name} tokens={value.distractor} inherited={value.target.length ? undefined : otherwise?.distractor} text={value.text} onChange={(distractor) => onTokens({ ...value, distractor })} />
      </div>
    </fieldset>
  );
}

/**
 * A set of tokens, each of which is exactly one token of the model.
 * @param {{label: string, name: string, tokens: string[], inherited?: string[], text: string, onChange: (tokens: string[]) => void}} props
 */
function TokenSet({ label, name, tokens, inherited, text, onChange }) {
  const [typed, setTyped] = useState('');
  const [wrong, setWrong] = useState('');
  const field = useRef(/** @type {HTMLInputElement | null} */ (null));
  const asked = useRef(0);
  const shown = tokens.length ? tokens : inherited ?? [];
  const borrowed = !tokens.length && shown.length > 0;

  async function add() {
    if (!typed) return;
    const turn = ++asked.current;
    try {
      const found = await oneToken(typed);
      if (turn !== asked.current) return;
      if (typeof found === 'string') {
        onChange([...tokens.filter((token) => token !== found), found]);
        setTyped('');
        setWrong('');
      } else setWrong(found.why);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      setWrong(error.message);
    }
  }
  const bare = tokens.filter((token) => /^[\p{L}\p{N}]/u.test(token) && text && !/\s$/.test(text));
  return (
    <div class="token-set">
      <span class="token-set-label">{label}</span>
      {shown.map((token) => (
        <span class={`chip${borrowed ? ' borrowed' : ''}`}>
          <code>{visible(token).replace(/^ /, '␣')}</code>
          {!borrowed && <Tool icon="close" label={`Remove ${label.toLowerCase()} ${JSON.stringify(token)}`} onClick={() => { onChange(tokens.filter((other) => other !== token)); field.current?.focus(); }} />}
        </span>
      ))}
      <input
        ref={field} class="token-input" aria-label={`Add a ${label.toLowerCase()} token of ${name}`} placeholder={shown.length ? '+' : 'token ↵'}
        value={typed} spellcheck={false} autoComplete="off" aria-invalid={wrong !== ''}
        onInput={(event) => { setTyped(event.currentTarget.value); setWrong(''); }}
        onKeyDown={(event) => {
          if (event.key === 'Enter' && !event.ctrlKey && !event.metaKey) {
            event.preventDefault();
            add();
          } else if (event.key === 'Backspace' && typed === '' && tokens.length) onChange(tokens.slice(0, -1));
        }}
        onBlur={add}
      />
      {wrong && <p class="hint bad" role="alert">{wrong}</p>}
      {!wrong && bare.length > 0 && (
        <p class="hint">
          {JSON.stringify(bare[0])} has no space before it.{' '}
          <button type="button" class="plain" onClick={() => onChange(tokens.map((token) => (token === bare[0] ? ` ${token}` : token)))}>Use {JSON.stringify(` ${bare[0]}`)}</button>
        </p>
      )}
    </div>
  );
}

/** The text as it is if it is one token, else with a space before it. @param {string} text @returns {Promise<string | {why: string}>} */
async function oneToken(text) {
  const ask = (/** @type {string} */ some) => post(url(['tokenize']), { text: some });
  const plain = await ask(text);
  if (plain.ids.length === 1) return text;
  if (!text.startsWith(' ') && (await ask(` ${text}`)).ids.length === 1) return ` ${text}`;
  const parts = plain.ids.slice(0, 8).map((/** @type {number} */ id) => JSON.stringify(plain.vocab[id] ?? `#${id}`));
  return { why: `${JSON.stringify(text)} is ${plain.ids.length} tokens: ${parts.join(', ')}. Give one token.` };
}
