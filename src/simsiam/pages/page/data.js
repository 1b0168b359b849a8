// The data of the page, from one JSON element.

const data = readData();
const several = data.runs.length > 1;

/** The data of the page, if it is as it was written. */
function readData() {
  const page = document.getElementById("page"), text = document.getElementById("data").textContent;
  if (crc32(text) === page.dataset.crc32) return JSON.parse(text);
  page.textContent = `This page is damaged: ${page.dataset.command} writes it again.`;
  throw new Error("the data do not match their checksum");
}

/** The CRC-32 of a text in ASCII, as eight hexadecimal digits. */
function crc32(text) {
  const table = Array.from({ length: 256 }, (_, byte) => {
    for (let bit = 0; bit < 8; bit++) byte = (byte >>> 1) ^ (byte & 1 ? 0xedb88320 : 0);
    return byte;
  });
  let crc = -1;
  for (let i = 0; i < text.length; i++) {
    crc = (crc >>> 8) ^ table[(crc ^ text.charCodeAt(i)) & 255];
  }
  return (~crc >>> 0).toString(16).padStart(8, "0");
}

/** Give each run a color and a name: the last part of its path, or the path if two are equal. */
function nameRuns() {
  const names = data.runs.map((run) => run.path.replace(/\/+$/, "").split("/").pop());
  const unique = new Set(names).size === names.length;
  data.runs.forEach((run, i) => {
    run.name = (unique && names[i]) || run.path;
    run.color = `var(--run-${i % 8})`;
  });
}
