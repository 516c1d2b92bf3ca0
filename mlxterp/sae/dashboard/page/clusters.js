// An order in which what is alike is side by side.

/** Leaves of the tree of average linkage: `alike[i][j]` in [0, 1], null for not known. */
export function clustered(alike) {
  let groups = alike.map((_, i) => [i]);
  const between = (a, b) => {
    let sum = 0;
    for (const i of a) for (const j of b) sum += alike[i][j] ?? 0;
    return sum / (a.length * b.length);
  };
  const near = groups.map(a => groups.map(b => between(a, b)));
  while (groups.length > 1) {
    let best = [0, 1];
    for (let i = 0; i < groups.length; i++)
      for (let j = 0; j < i; j++)
        if (near[i][j] > near[best[0]][best[1]] || best[0] === best[1]) best = [i, j];
    const [i, j] = best[0] > best[1] ? best : [best[1], best[0]];
    groups[j] = facing(groups[j], groups[i], alike);
    groups = groups.filter((_, at) => at !== i);
    near.splice(i, 1);
    near.forEach(row => row.splice(i, 1));
    groups.forEach((group, at) => {
      if (at !== j) near[at][j] = near[j][at] = between(group, groups[j]);
    });
  }
  return groups[0] ?? [];
}

/** Two runs of leaves as one, turned so that their more alike ends meet. */
function facing(a, b, alike) {
  const back = list => [...list].reverse();
  const ways = [
    [a, b],
    [a, back(b)],
    [back(a), b],
    [back(a), back(b)],
  ];
  const meet = ([x, y]) => alike[x.at(-1)][y[0]] ?? 0;
  return ways.reduce((best, way) => (meet(way) > meet(best) ? way : best)).flat();
}
