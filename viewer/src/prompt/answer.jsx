// What the model says about a prompt: how far target and distractor are apart, the likeliest next tokens, and
// what each token of the prompt contributes.
import { useMemo } from 'preact/hooks';
import { Scale, Tokens } from '../components/tokens.jsx';
import { fixed, percentage, visible } from '../format.js';
import { tokenText } from '../vocabulary.js';

/** A token in running text, its leading space made visible. @param {{id: number, words: any}} props */
export function TokenWord({ id, words }) {
  return <code class="word">{tokenText(id, words).replace(/^ /, '␣')}</code>;
}

/** @param {{data: any, two: boolean, changed: boolean}} props */
export function Verdict({ data, two, changed }) {
  return (
    <div class={`verdict${two ? ' two' : ''}`}>
      {data.prompts.map((/** @type {any} */ one, /** @type {number} */ i) => (
        <dl key={i} class="figures" data-prompt={'AB'[i]}>
          <div class="main">
            <dt>{one.distractor_ids?.length ? 'Logit difference' : 'Logit of the target'}{two ? ` ${'AB'[i]}` : ''}</dt>
            <dd><b class="tabular" data-value={one.logit_difference}>{fixed(one.logit_difference)}</b>{changed && <span class="soft tabular" data-baseline={one.baseline_logit_difference}> unchanged {fixed(one.baseline_logit_difference)}</span>}</dd>
          </div>
          {(one.target_ids ?? []).map((/** @type {number} */ id, /** @type {number} */ j) => (
            <div><dt>Target <TokenWord id={id} words={data} /></dt><dd class="tabular">{percentage(one.target_probabilities?.[j])}</dd></div>
          ))}
          {(one.distractor_ids ?? []).map((/** @type {number} */ id, /** @type {number} */ j) => (
            <div><dt>Distractor <TokenWord id={id} words={data} /></dt><dd class="tabular">{percentage(one.distractor_probabilities?.[j])}</dd></div>
          ))}
          {one.loss !== undefined && one.loss !== null && <div><dt title="of the prompt's own tokens, in nats per token">Loss</dt><dd class="tabular">{fixed(one.loss)}</dd></div>}
        </dl>
      ))}
      {two && (
        <dl class="figures" data-prompt="diff">
          <div class="main"><dt>A − B</dt><dd><b class="tabular" data-value={data.prompts[0].logit_difference - data.prompts[1].logit_difference}>{fixed(data.prompts[0].logit_difference - data.prompts[1].logit_difference)}</b></dd></div>
        </dl>
      )}
    </div>
  );
}

/**
 * The likeliest next tokens; logits are relative to the target's.
 * @param {{data: any, two: boolean, onTarget: (text: string, role: 'target' | 'distractor') => void}} props
 */
export function Candidates({ data, two, onTarget }) {
  const [a, b] = data.prompts;
  const zero = data.prompts.map((/** @type {any} */ one) => {
    const own = one.top_logits.find((/** @type {any} */ t) => t.id === one.target_ids?.[0]);
    return one.target_logit ?? own?.logit ?? one.top_logits[0]?.logit ?? 0;
  });
  const inB = new Map((b?.top_logits ?? []).map((/** @type {any} */ t) => [t.id, t]));
  const most = Math.max(...a.top_logits.map((/** @type {any} */ t) => t.prob), 1e-9);
  return (
    <div class="scroll-y" tabIndex={0} role="region" aria-label="Likeliest next tokens">
      <table class="candidates">
        <thead>
          <tr>
            <th scope="col">Token</th>
            {two ? <><th scope="col" class="num">A</th><th scope="col" class="num">B</th><th scope="col" class="num">A − B</th></> : <><th scope="col" class="num">Probability</th><th scope="col" class="num" title="the logit minus that of the target">Δ logit</th></>}
            <th scope="col"><span class="hidden">Use as</span></th>
          </tr>
        </thead>
        <tbody>
          {a.top_logits.map((/** @type {any} */ top) => {
            const other = inB.get(top.id);
            const text = data.vocab[top.id] ?? '';
            const role = a.target_ids?.includes(top.id) ? 'target' : a.distractor_ids?.includes(top.id) ? 'distractor' : '';
            return (
              <tr class={role} data-token={top.id}>
                <th scope="row"><TokenWord id={top.id} words={data} /></th>
                {two ? (
                  <>
                    <td class="num">{percentage(top.prob)}</td>
                    <td class="num">{other ? percentage(other.prob) : '–'}</td>
                    <td class="num">{other ? fixed(top.logit - zero[0] - (other.logit - zero[1]), 2) : '–'}</td>
                  </>
                ) : (
                  <>
                    <td class="num share"><svg class="prob-bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true"><rect width={(100 * top.prob) / most} height="8" /></svg>{percentage(top.prob)}</td>
                    <td class="num" data-logit={top.logit}>{fixed(top.logit - zero[0], 2)}</td>
                  </>
                )}
                <td class="do">
                  <button type="button" class="plain" aria-pressed={role === 'target'} aria-label={`Use ${JSON.stringify(visible(text))} as target`} title="Use as target" onClick={() => onTarget(text, 'target')}>T</button>
                  <button type="button" class="plain" aria-pressed={role === 'distractor'} aria-label={`Use ${JSON.stringify(visible(text))} as distractor`} title="Use as distractor" onClick={() => onTarget(text, 'distractor')}>D</button>
                </td>
              </tr>
            );
          })}
        </tbody>
      </table>
    </div>
  );
}

const PARTS = /** @type {const} */ ([
  ['embedding', 'Embedding', 'the token itself'],
  ['mlp', 'MLP', 'the MLPs at this token'],
  ['attention_from', 'Attention from', 'the heads that look from this token'],
  ['attention_to', 'Attention to', 'the heads that look at this token'],
]);

/**
 * What each token contributes to the target, by kind of part.
 * @param {{data: any, two: boolean, position: number | 'all', onPosition: (position: number) => void}} props
 */
export function TokenEffects({ data, two, position, onPosition }) {
  const scale = useMemo(() => {
    const all = data.prompts.flatMap((/** @type {any} */ one) => PARTS.flatMap(([key]) => one.token_effects?.[key] ?? []));
    return Math.max(1e-12, ...all.map((/** @type {number} */ x) => Math.abs(x)));
  }, [data]);
  const last = data.prompts[0].ids.length - 1;
  const picked = position === 'all' ? undefined : position < 0 ? last : position;
  return (
    <>
      {data.prompts.map((/** @type {any} */ one, /** @type {number} */ i) => (
        <div class="effects" key={i} data-prompt={'AB'[i]}>
          {two && <h3>Prompt {'AB'[i]}</h3>}
          {PARTS.map(([key, name, what]) => one.token_effects?.[key] && (
            <div class="effect" data-part={key}>
              <span class="effect-name" title={what}>{name}</span>
              <Tokens
                ids={one.ids} words={data} values={Float64Array.from(one.token_effects[key])} scale={scale} label={`${name}: ${what}${two ? `, prompt ${'AB'[i]}` : ''}`}
                picked={i === 0 ? picked : undefined} onPick={i === 0 ? onPosition : undefined}
              />
            </div>
          ))}
        </div>
      ))}
      <p class="row soft"><Scale scale={scale} signed /> <span>Choose a token to see its nodes.</span></p>
    </>
  );
}

/** Tokens of a vocabulary with a number each. @param {{title: any, items: {id: number, value: number}[], words: any, empty?: string}} props */
export function TokenList({ title, items, words, empty = 'none' }) {
  return (
    <div class="token-list">
      <h3>{title}</h3>
      {items.length === 0 ? <p class="soft">{empty}</p> : (
        <ol>{items.map(({ id, value }) => <li data-token={id} data-value={value}><TokenWord id={id} words={words} /><span class="tabular soft">{fixed(value, 2)}</span></li>)}</ol>
      )}
    </div>
  );
}
