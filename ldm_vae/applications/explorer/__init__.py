"""The explorer: one model, or two, seen and touched in a browser. `explored` opens it, `server` answers the page."""
