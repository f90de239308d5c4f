"""The studio: Gradio on the same server, beside the REST API. It calls the engine in-process."""

from __future__ import annotations

import gradio as gr
from fastapi import FastAPI, Response

from okavango.web.services import Services
from okavango.web.studio import brand, theme
from okavango.web.studio.adapters import AdaptersPage
from okavango.web.studio.chat import ChatPage
from okavango.web.studio.job_media import JobMedia
from okavango.web.studio.markup import digest
from okavango.web.studio.routes import add_routes
from okavango.web.studio.training import TrainingPage

DAY = 24 * 3600
# How often uploads are swept, and how old they are then, in seconds.
SWEEP = (3600, DAY)

TITLE = "Okavango studio"
CHAT = "chat"


def build_studio(services: Services, job_media: JobMedia, path: str) -> gr.Blocks:
    """The studio's pages, not mounted yet. `path`: where they will be."""
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=SWEEP, fill_width=True, fill_height=True
    ) as studio:
        header = brand.header(services.base.name, digest(services.base.digest))
        gr.HTML(header, elem_id="okv-header", apply_default_css=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Chat", id=CHAT) as chat_tab:
                chat = ChatPage(services)
            with gr.Tab("Training", id="training") as training_tab:
                training = TrainingPage(services, job_media, training_tab, path)
            with gr.Tab("Adapters", id="adapters") as adapters_tab:
                adapters = AdaptersPage(services, adapters_tab)
        chat.follow(studio, chat_tab)
        training.try_in(tabs, chat, CHAT)
        training.rest([chat_tab, adapters_tab])
        adapters.rest([chat_tab, training_tab])
    return studio


def mount_studio(app: FastAPI, services: Services, path: str) -> None:
    """Serve the studio under a path of the app."""

    # Browsers ask for this before they read that the page brings its own.
    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> Response:
        return Response(brand.mark(brand.COLOUR), media_type="image/svg+xml")

    job_media = JobMedia(services)
    add_routes(app, services, job_media, path)
    gr.mount_gradio_app(
        app,
        build_studio(services, job_media, path),
        path=path,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=services.options.media.media_bytes,
        ssr_mode=False,
        mcp_server=False,
        theme=theme.theme(),
        css=theme.css(),
        head=brand.icon() + theme.head(),
    )
