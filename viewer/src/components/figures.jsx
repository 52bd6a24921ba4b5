/** Figures under a title. @param {{items: [string, string, string?][]}} props names, values and remarks */
export function Figures({ items }) {
  return <dl class="facts">{items.map(([name, value, remark]) => <div key={name}><dt>{name}</dt><dd>{value}{remark && <small>{remark}</small>}</dd></div>)}</dl>;
}
