import { fixed, visible } from '../format.js';

export const LABELS_ARE = 'what it means, who says so, and how well that predicts its activations';

/** @param {{labels: import('./types.js').Label[]}} props */
export function LabelList({ labels }) {
  return (
    <ul class="labels">
      {labels.map((label) => (
        <li key={label.id}>
          <p>{visible(label.text)}</p>
          <p class="small soft row"><span>{visible(label.source)}</span>{label.score !== null && <span title="score of its method">{fixed(label.score, 3)}</span>}</p>
        </li>
      ))}
    </ul>
  );
}
