"""Who looks at a page."""

from __future__ import annotations

import gradio as gr


def principal_of(request: gr.Request) -> str:
    """As web.security found out."""
    call = request.request
    assert call is not None  # only outside a server is there none
    return str(call.scope["state"].get("principal", "local"))
