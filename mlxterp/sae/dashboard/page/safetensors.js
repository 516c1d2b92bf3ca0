// Arrays as the safetensors format has them.

const TYPES = { F32: Float32Array, U32: Uint32Array, I32: Int32Array, U8: Uint8Array };

/** `{columns: {name: TypedArray}, width: {name: numbers per row}, n: rows}` of a file. */
export function parseTable(buffer) {
  const view = new DataView(buffer);
  const length = Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const columns = {},
    width = {};
  let n = 0;
  for (const [
    name,
    {
      dtype,
      shape,
      data_offsets: [begin, end],
    },
  ] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (!TYPES[dtype]) throw new Error(`The column ${name} has the unknown type ${dtype}.`);
    columns[name] = new TYPES[dtype](buffer.slice(8 + length + begin, 8 + length + end));
    width[name] = shape.length > 1 ? shape[1] : 1;
    n = shape[0];
  }
  return { columns, width, n };
}
