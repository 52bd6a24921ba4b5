// The card of one unit: the same on the server's pages, in exported files and in notebooks.
import { Figures } from '../components/figures.jsx';
import { count, number, percentage } from '../format.js';
import { Examples } from './examples.jsx';
import { Inputs, Logits, Neighbours, Partners, Values } from './side.jsx';

/** @typedef {import('./types.js').Card} Card */
/** @typedef {import('./types.js').CardState} CardState */

const BADGES = /** @type {Record<string, [string, string]>} */ ({
  dead: ['never active', 'It was at 0 on every token that was looked at.'],
  dense: ['dense', 'It is active on at least a tenth of all tokens: often no concept, but a direction in common use.'],
  single_token: ['one token', 'All its examples peak on the same token.'],
  start_only: ['start only', 'It is active on first tokens only, which attention uses as a resting place.'],
});

/** @param {{badges: string[]}} props */
export function Badges({ badges }) {
  return <>{badges.map((badge) => <span class={`badge ${badge}`} title={BADGES[badge]?.[1]}>{BADGES[badge]?.[0] ?? badge}</span>)}</>;
}

/** `Latent 17` @param {Card} card */
export function titleOf(card) {
  return `${card.kind[0].toUpperCase()}${card.kind.slice(1)} ${card.unit}`;
}

/** The figures under the title. @param {{card: Card}} props */
export function Facts({ card }) {
  const s = card.stats;
  const what = card.kind === 'head' ? 'pairs' : 'tokens';
  return <Figures items={[
    ['active', percentage(s.density), `${count(s.count)} of ${count(s.n_tokens)} ${what}`],
    ['largest', number(s.max), card.signed ? `smallest ${number(s.min)}` : ''],
    ['mean where active', number(s.mean), `standard deviation ${number(Math.sqrt(Math.max(s.variance, 0)))}`],
    ['skewness', number(s.skewness), ''],
    ['kurtosis', number(s.kurtosis), '3 for a normal one'],
  ]} />;
}

/**
 * @param {{
 *   card: Card, state: CardState, onState: (patch: CardState) => void, linkTo: import('./side.jsx').LinkTo,
 *   logits?: import('../api.js').Asked<any>, neighbours?: import('../api.js').Asked<any>,
 *   long?: boolean, onLong?: (long: boolean) => void,
 *   promptLink?: (text: string) => string, first?: any, labels?: any,
 * }} props
 * `first` stands above the examples, `labels` at the head of the side
 */
export function FeatureCard({ card, state, onState, linkTo, logits, neighbours, long, onLong, promptLink, first, labels }) {
  return (
    <div class="card-grid">
      <div class="card-main">
        {first}
        <Examples card={card} state={state} onState={onState} promptLink={promptLink} />
        <div class="card-pair">
          <Partners card={card} linkTo={linkTo} />
          {neighbours && <Neighbours asked={neighbours} card={card} linkTo={linkTo} />}
        </div>
      </div>
      <div class="card-side">
        <Values card={card} state={state} onState={onState} />
        {labels}
        {logits && <Logits asked={logits} long={long} onLong={onLong} />}
        {logits && <Inputs asked={logits} />}
      </div>
    </div>
  );
}
