// What is changed in the model while it runs, and the way from the target to the node that is traced.
import { useState } from 'preact/hooks';
import { Icon } from '../components/icons.jsx';
import { Tool } from '../components/panel.jsx';
import { fixed, visible } from '../format.js';
import { dictionaries, model } from '../state.js';
import { nodeName } from './nodes.js';
import { ACTIONS, FIRST_VALUE } from './state.js';

/** @typedef {import('./state.js').Intervention} Intervention */
/** @typedef {import('./state.js').Step} Step */

const ACTION_TEXT = { zero: 'set to 0', mean: 'set to its mean', set: 'set to', scale: 'multiply by', add: 'add', swap: 'take from B' };

/**
 * @param {{interventions: Intervention[], tokens: string[], hasB: boolean, onChange: (next: Intervention[]) => void,
 *   onUndo: (() => void) | null, onRedo: (() => void) | null, before: number | null, after: number | null}} props
 */
export function Tray({ interventions, tokens, hasB, onChange, onUndo, onRedo, before, after }) {
  const [adding, setAdding] = useState(false);
  return (
    <section class="tray" aria-label="Interventions">
      <header class="row">
        <h2>Interventions</h2>
        {interventions.length > 0 && (
          <span class="tray-sum tabular" data-before={before ?? ''} data-after={after ?? ''}>
            {fixed(before)} → <b>{fixed(after)}</b>
            {before !== null && after !== null && <span class="soft"> ({after - before < 0 ? '−' : '+'}{fixed(Math.abs(after - before))})</span>}
          </span>
        )}
        {interventions.length === 0 && <p class="soft grow">Nothing is changed. In the table, <kbd>a</kbd> sets a node to 0 and <kbd>s</kbd> steers along it.</p>}
        <span class="push" />
        <button type="button" aria-expanded={adding} onClick={() => setAdding(!adding)}><Icon name="plus" /> Any unit</button>
        <button type="button" disabled={!onUndo} onClick={() => onUndo?.()} title="Undo (u)">Undo</button>
        <button type="button" disabled={!onRedo} onClick={() => onRedo?.()} title="Redo (U)">Redo</button>
        {interventions.length > 0 && <button type="button" onClick={() => onChange([])}>Clear</button>}
      </header>
      {adding && <Add onAdd={(one) => onChange([...interventions, one])} />}
      {interventions.length > 0 && (
        <ol>
          {interventions.map((one, i) => (
            <Line
              key={JSON.stringify(one)} one={one} tokens={tokens} hasB={hasB}
              onChange={(next) => onChange(interventions.map((other, j) => (j === i ? next : other)))}
              onRemove={() => onChange(interventions.filter((_, j) => j !== i))}
            />
          ))}
        </ol>
      )}
    </section>
  );
}

/** A change of any unit of the model or of a dictionary, also of one that no table lists. @param {{onAdd: (one: Intervention) => void}} props */
function Add({ onAdd }) {
  const [layer, setLayer] = useState('0');
  const [place, setPlace] = useState('mlp.post_act');
  const [unit, setUnit] = useState('');
  const latents = dictionaries.value.filter((one) => one.kind === 'latent' && one.layer === Number(layer) && one.has_autoencoder);
  const sites = /** @type {any[]} */ (model.value?.sites ?? []);
  const latent = latents.find((one) => one.id === place);
  const site = sites.find((one) => one.path === place) ?? sites[0];
  function add() {
    const location = latent?.location ?? (site.layers ? `${layer}/${site.path}` : site.path);
    onAdd({ node: { location, kind: latent ? 'latent' : site.units ?? (site.shape.at(-1) === 'h' ? 'head' : 'channel'), unit: unit === '' ? null : Number(unit), position: null, dictionary: latent?.id ?? null }, action: 'zero', value: null });
  }
  if (!site) return <p class="soft">The places are known as soon as the model has been loaded.</p>;
  return (
    <form class="row" aria-label="Change any unit" onSubmit={(event) => { event.preventDefault(); add(); }}>
      <label>Layer <select value={layer} onChange={(event) => setLayer(event.currentTarget.value)}>{Array.from({ length: model.value.n_layers }, (_, i) => <option value={String(i)}>{i}</option>)}</select></label>
      <label>Place
        <select value={latent?.id ?? site.path} onChange={(event) => setPlace(event.currentTarget.value)}>
          <optgroup label="of the model">{sites.map((one) => <option value={one.path}>{one.path}</option>)}</optgroup>
          {latents.length > 0 && <optgroup label="latents">{latents.map((one) => <option value={one.id}>{one.name}</option>)}</optgroup>}
        </select>
      </label>
      <label>{latent ? 'Latent' : site.units ? `${site.units[0].toUpperCase()}${site.units.slice(1)}` : 'Unit'} <input type="number" min={0} max={latent ? latent.n - 1 : undefined} required={!!latent} placeholder={latent ? '' : 'all'} value={unit} onInput={(event) => setUnit(event.currentTarget.value)} /></label>
      <button type="submit" class="primary">Set to 0</button>
      <span class="soft small">Below, it can be given another value, and tokens.</span>
    </form>
  );
}

/** @param {{one: Intervention, tokens: string[], hasB: boolean, onChange: (next: Intervention) => void, onRemove: () => void}} props */
function Line({ one, tokens, hasB, onChange, onRemove }) {
  const name = nodeName(one.node);
  const [typed, setTyped] = useState(one.value === null ? '' : String(one.value));
  const wrong = one.value !== null && !Number.isFinite(typed.trim() === '' ? NaN : Number(typed));
  const commit = () => !wrong && Number(typed) !== one.value && onChange({ ...one, value: Number(typed) });
  return (
    <li class="row">
      <code>{name}</code>
      <select aria-label={`What happens to ${name}`} value={one.action} onChange={(event) => { const action = /** @type {Intervention['action']} */ (event.currentTarget.value); onChange({ ...one, action, value: FIRST_VALUE[action] }); }}>
        {ACTIONS.filter((action) => action === one.action || (action === 'swap' ? hasB : !(one.node.kind === 'head' && ['set', 'add'].includes(action)) && !(one.node.unit === null && action === 'add'))).map((action) => <option value={action}>{ACTION_TEXT[action]}</option>)}
      </select>
      {one.value !== null && (
        <input class="value" inputMode="decimal" aria-label={`Value for ${name}`} aria-invalid={wrong} value={typed} onInput={(event) => setTyped(event.currentTarget.value)} onBlur={commit} onKeyDown={(event) => event.key === 'Enter' && (event.preventDefault(), commit())} />
      )}
      <label>at{' '}
        <select aria-label={`Tokens at which ${name} changes`} value={one.node.position === null ? 'all' : String(one.node.position)} onChange={(event) => onChange({ ...one, node: { ...one.node, position: event.currentTarget.value === 'all' ? null : Number(event.currentTarget.value) } })}>
          <option value="all">every token</option>
          {tokens.map((token, i) => <option value={String(i)}>{i}: {visible(token)}</option>)}
        </select>
      </label>
      <Tool icon="close" label={`Remove the intervention on ${name}`} onClick={onRemove} />
    </li>
  );
}

const THROUGH = { q: 'query', k: 'key', qk: 'query and key', v: 'value' };

/** @param {{trace: Step[], target: string, onTrace: (trace: Step[]) => void}} props */
export function Breadcrumb({ trace, target, onTrace }) {
  if (!trace.length) return null;
  return (
    <nav class="breadcrumb" aria-label="Trace">
      <ol>
        <li><button type="button" class="plain" onClick={() => onTrace([])}>{target}</button></li>
        {trace.map((step, i) => {
          const text = `${nodeName(step.node)} at ${step.node.position}${step.node.attended === null ? '' : ` from ${step.node.attended}`}${step.through ? `, ${THROUGH[step.through]}` : ''}`;
          const last = i === trace.length - 1;
          return <li>{last ? <b aria-current="step">{text}</b> : <button type="button" class="plain" onClick={() => onTrace(trace.slice(0, i + 1))}>{text}</button>}</li>;
        })}
      </ol>
      <span class="soft">The table shows what makes this node what it is.</span>
      <button type="button" onClick={() => onTrace(trace.slice(0, -1))}>Back <kbd>T</kbd></button>
    </nav>
  );
}
