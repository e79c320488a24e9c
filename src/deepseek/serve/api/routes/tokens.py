"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from fastapi import APIRouter

from deepseek.serve.api.schema.answers import DetokenizeAnswer, TokenizeAnswer, TokenizerInfo
from deepseek.serve.api.schema.completion import DetokenizeBody, TokenizeBody
from deepseek.serve.api.service import Service
from deepseek.serve.api.strict_json import StrictRoute
from deepseek.serve.api.tools import show_tools


def tokens_router(service: Service) -> APIRouter:
    """Return the router of texts and tokens."""
    router = APIRouter(route_class=StrictRoute, tags=["tokens"])
    tokenizer, prompts = service.generator.tokenizer, service.reader.prompts

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> TokenizeAnswer:
        """Return the token ids of a text or a conversation."""
        service.reader.adapter(body.model)
        if body.messages is not None:
            ids = await prompts.of_chat(
                body.messages,
                show_tools(body.tools or ()),
                body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt is not False,
            )
        else:
            has_begin = body.add_special_tokens is not False
            [ids] = await prompts.of_text([body.prompt or ""], add_special_tokens=has_begin)
        shown = [service.texts.text_of(token) for token in ids] if body.return_token_strs else None
        return TokenizeAnswer(
            count=len(ids),
            max_model_len=service.generator.context,
            tokens=ids,
            token_strs=shown,
        )

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> DetokenizeAnswer:
        """Return the text of token ids, special tokens written out."""
        service.reader.adapter(body.model)
        service.reader.check_ids(body.tokens, "tokens")
        return DetokenizeAnswer(prompt=await prompts.text_of(body.tokens))

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """Return the special tokens and the chat template, as evaluation programs ask for them."""
        named = tokenizer.special_tokens
        return TokenizerInfo(
            eos_token=named.get("eos_token"),
            bos_token=named.get("bos_token"),
            pad_token=named.get("pad_token"),
            chat_template=tokenizer.chat_template,
        )

    return router
