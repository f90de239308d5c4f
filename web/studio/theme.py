"""How the studio looks. System fonts, and nothing from other hosts: it works without a net."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes import Color

_RIVER = Color(
    name="river",
    c50="#effaf8",
    c100="#d6f2ed",
    c200="#aee4dc",
    c300="#7bcfc5",
    c400="#45b3a9",
    c500="#1f978f",
    c600="#147a75",
    c700="#13625f",
    c800="#134e4d",
    c900="#134140",
    c950="#042626",
)
_STONE = Color(
    name="stone",
    c50="#f8f9f8",
    c100="#f1f3f2",
    c200="#e3e7e5",
    c300="#cdd4d1",
    c400="#98a4a0",
    c500="#6a7773",
    c600="#4e5a57",
    c700="#3b4543",
    c800="#232b2a",
    c900="#171e1d",
    c950="#0e1413",
)


def theme() -> gr.themes.Base:
    made = gr.themes.Base(
        primary_hue=_RIVER,
        secondary_hue=_RIVER,
        neutral_hue=_STONE,
        radius_size=gr.themes.sizes.radius_md,
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    return made.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_shadow="none",
        block_title_text_weight="600",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="#10302f",
        border_color_accent_subdued_dark="*primary_900",
        slider_color="*primary_600",
    )


def css() -> str:
    return text_of("studio.css")


def head() -> str:
    """What goes into the page's head: the script for copying."""
    return f"<script>{text_of('studio.js')}</script>"


def text_of(name: str) -> str:
    """A style sheet or script that lies beside this module."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
