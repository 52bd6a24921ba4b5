/** Icons of 16 by 16, drawn in the colour of the text. */
const PATHS = {
  json: 'M6 2.5C4 2.5 5 7 3 8c2 1 1 5.5 3 5.5M10 2.5c2 0 1 4.5 3 5.5-2 1-1 5.5-3 5.5',
  python: 'M5.5 4.5 2 8l3.5 3.5M10.5 4.5 14 8l-3.5 3.5',
  maximise: 'M9.5 2.5h4v4M13.5 2.5l-5 5M6.5 13.5h-4v-4M2.5 13.5l5-5',
  minimise: 'M13.5 6.5h-4v-4M9.5 6.5l4.5-4.5M2.5 9.5h4v4M6.5 9.5 2 14',
  link: 'M6.5 9.5a2.8 2.8 0 0 0 4 0l2.5-2.5a2.8 2.8 0 0 0-4-4l-1 1M9.5 6.5a2.8 2.8 0 0 0-4 0L3 9a2.8 2.8 0 0 0 4 4l1-1',
  left: 'M10 3 5 8l5 5',
  right: 'M6 3l5 5-5 5',
  up: 'M3 10l5-5 5 5',
  down: 'M3 6l5 5 5-5',
  search: 'M7 12A5 5 0 1 0 7 2a5 5 0 0 0 0 10ZM10.7 10.7 14 14',
  close: 'M3.5 3.5l9 9M12.5 3.5l-9 9',
  bookmark: 'M4 2.5h8v11L8 10.5l-4 3Z',
  compare: 'M2.5 3.5h4.5v9H2.5ZM9 3.5h4.5v9H9Z',
  pencil: 'M3 13l.7-3L10.5 3.2l2.3 2.3L6 12.3Z',
  dice: 'M3 3h10v10H3ZM5.9 6h.200M9.9 6h.200M7.9 8h.200M5.9 10h.200M9.9 10h.2',
  model: 'M3 3h10v3H3ZM3 10h10v3H3ZM8 6v4',
  grid: 'M3 3h4v4H3ZM9 3h4v4H9ZM3 9h4v4H3ZM9 9h4v4H9Z',
  prompt: 'M2.5 3.5h11v7h-6l-3 2.5v-2.5h-2Z',
  feature: 'M3 13V9M6.3 13V4M9.7 13V7M13 13v-3',
  factors: 'M2.5 12.5l3.5-6 3 3.5 4.5-7',
  head: 'M3 13V3l10 10V3',
  help: 'M6 6a2 2 0 1 1 2.8 1.8c-.6.3-.8.6-.8 1.4M8 12h.01',
  sun: 'M8 5a3 3 0 1 0 0 6 3 3 0 0 0 0-6ZM8 1.5v1M8 13.5v1M1.5 8h1M13.5 8h1M3.4 3.4l.7.7M11.9 11.9l.7.7M3.4 12.6l.7-.700M11.9 4.1l.7-.7',
  moon: 'M13 9.5A5.5 5.5 0 0 1 6.5 3a5.5 5.5 0 1 0 6.5 6.5Z',
  auto: 'M8 2.5a5.5 5.5 0 1 0 0 11ZM8 2.5a5.5 5.5 0 0 1 0 11',
  plus: 'M8 3v10M3 8h10',
  play: 'M5 3l8 5-8 5Z',
  stop: 'M4 4h8v8H4Z',
  ban: 'M8 2.5a5.5 5.5 0 1 0 0 11 5.5 5.5 0 0 0 0-11ZM4.2 4.2l7.6 7.6',
};

/** @typedef {keyof typeof PATHS} IconName */

/** @param {{name: IconName, size?: number}} props */
export function Icon({ name, size = 16 }) {
  return (
    <svg class="icon" viewBox="0 0 16 16" width={size} height={size} aria-hidden="true" focusable="false">
      <path d={PATHS[name]} />
    </svg>
  );
}
