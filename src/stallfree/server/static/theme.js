// Chooses the theme before anything is painted: the one chosen last, or the system's.
(function () {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const show = () => {
    const chosen = localStorage.getItem("stallfree-theme");
    document.documentElement.dataset.theme = chosen || (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", show);
  show();
})();
