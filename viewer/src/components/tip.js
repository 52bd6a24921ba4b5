// One small card beside what the pointer or the focus is on.

/** @type {HTMLElement | null} */ let card = null;

/**
 * Show lines beside an element. Plain text only.
 * @param {Element} target @param {string[]} lines the first one stands out
 */
export function showTip(target, lines) {
  const root = target.closest('.nx');
  if (!root) return;
  if (!card || card.parentNode !== root) {
    card?.remove();
    card = document.createElement('div');
    card.className = 'tip';
    card.id = 'nx-tip';
    card.setAttribute('role', 'tooltip');
    root.append(card);
  }
  card.replaceChildren(
    ...lines.map((line, i) => {
      const row = document.createElement(i ? 'div' : 'strong');
      row.textContent = line;
      return row;
    }),
  );
  card.hidden = false;
  card.style.left = card.style.top = '0px';
  const box = target.getBoundingClientRect();
  // Where it is now is not the corner of the window if something around it contains it, as in JupyterLab.
  const { left: x, top: y, width, height } = card.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), document.documentElement.clientWidth - width - 8);
  const above = box.top - height - 8;
  card.style.left = `${Math.round(left - x)}px`;
  card.style.top = `${Math.round((above < 8 ? box.bottom + 8 : above) - y)}px`;
}

export function hideTip() {
  if (card) card.hidden = true;
}
