// Short messages at the lower edge. The shell shows them; elsewhere (exported files) nobody listens.

/** @param {string} text @param {'plain' | 'bad'} [tone] */
export function notify(text, tone = 'plain') {
  dispatchEvent(new CustomEvent('nx-notice', { detail: { text, tone } }));
}

/**
 * Copy a text and say so. Where the browser forbids it (plain http on another machine), the text is shown
 * for copying by hand.
 * @param {string} text @param {string} what
 */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    notify(`${what} copied`);
  } catch {
    dispatchEvent(new CustomEvent('nx-copy', { detail: { text, what } }));
  }
}
