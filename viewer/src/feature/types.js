/**
 * @typedef {object} Example
 * @property {string} group
 * @property {number} interval
 * @property {number | null} low
 * @property {number | null} high
 * @property {number} rank
 * @property {number} value
 * @property {number} peak
 * @property {number} document
 * @property {number} start
 * @property {number} position
 * @property {number[]} ids
 * @property {[number, number][]} acts
 * @property {boolean} pairs
 *
 * @typedef {object} Label
 * @property {string} id
 * @property {string} source
 * @property {string} text
 * @property {number | null} score
 * @property {boolean} editable
 *
 * @typedef {object} Card the reply of `/dictionaries/{d}/features/{i}`
 * @property {string} dictionary
 * @property {number} unit
 * @property {'latent' | 'neuron' | 'channel' | 'head'} kind
 * @property {string} location
 * @property {boolean} signed
 * @property {Record<string, number>} stats
 * @property {import('../components/histogram.jsx').Bins} hist
 * @property {string[]} badges
 * @property {Example[]} examples
 * @property {{unit: number, both: number, jaccard: number, pmi: number, phi: number, label: string | null}[]} partners
 * @property {Label[]} labels
 * @property {boolean} [bookmarked]
 * @property {number | null} prev_alive
 * @property {number | null} next_alive
 * @property {string | null} [prev_layer]
 * @property {string | null} [next_layer]
 * @property {Record<string, string>} vocab
 * @property {Record<string, string>} [vocab_bytes]
 * @property {string} python
 *
 * @typedef {object} CardState what of the card is in the address
 * @property {string} [group]
 * @property {string} [range] `low..high`
 * @property {string} [width]
 * @property {string} [dedupe]
 */
export {};
