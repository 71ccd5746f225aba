// Before anything is painted: the reader's choice of light or dark, kept in this browser. No module, so it comes first.
"use strict";
try {
  const { theme } = JSON.parse(localStorage.getItem("nanochat.settings") ?? "{}") ?? {};
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is forbidden or damaged: the system's choice holds
}
