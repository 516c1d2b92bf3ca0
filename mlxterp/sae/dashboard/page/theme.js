// Light or dark: as the system has it, until somebody says otherwise.

const KEY = "mlxterp-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function stored() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

export function isDark() {
  const set = document.documentElement.dataset.theme;
  return set ? set === "dark" : system.matches;
}

const changed = () => document.dispatchEvent(new Event("themechange"));

export function startTheme() {
  const theme = stored();
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  system.addEventListener("change", changed);
}

export function turnTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    /* A file may have no storage: the theme holds while it is open. */
  }
  changed();
}
