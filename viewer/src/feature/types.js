/**
 * Parts of the reply of `/dictionaries/{d}/features/{i}`, and that reply:
 * @typedef {{
 *   group: string, interval: number, low: number | null, high: number | null, rank: number, value: number, peak: number,
 *   document: number, start: number, position: number, ids: number[], acts: [number, number][], pairs: boolean,
 * }} Example
 * @typedef {{id: string, source: string, text: string, score: number | null, editable: boolean}} Label
 * @typedef {{unit: number, both: number, jaccard: number, pmi: number, phi: number, label: string | null}} Partner
 * @typedef {{
 *   dictionary: string, unit: number, kind: 'latent' | 'neuron' | 'channel' | 'head', location: string, signed: boolean,
 *   stats: Record<string, number>, hist: import('../components/histogram.jsx').Bins, badges: string[], examples: Example[],
 *   partners: Partner[], labels: Label[], bookmarked?: boolean, prev_alive: number | null, next_alive: number | null,
 *   prev_layer?: string | null, next_layer?: string | null, vocab: Record<string, string>, vocab_bytes?: Record<string, string>,
 *   python: string,
 * }} Card
 *
 * What of the card is in the address; range is `low..high`:
 * @typedef {{group?: string, range?: string, width?: string, dedupe?: string}} CardState
 */
export {};
