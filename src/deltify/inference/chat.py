"""Chat in the terminal. The cache is kept between turns, so that each turn reads only new tokens."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from ..model.cache import new_cache
from ..model.causal_lm import CausalLM
from ..model.modeling import cache_argument
from ..utils.tokens import token_ids
from .generate import STREAMED, sampling_options
from .loading import load_model, load_tokenizer


class Conversation:
    """A model, the messages so far, and the cache after them.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """

    def __init__(self, model: CausalLM, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template. For models that only continue text, use deltify generate."
            )
        self.model, self.tokenizer = model, tokenizer
        self.clear()

    def clear(self) -> None:
        """Forget all messages."""
        self.messages: list[dict[str, str]] = []
        self.text = ""  # all messages as the template writes them
        self.ids = torch.empty(1, 0, dtype=torch.long)
        self.cache = new_cache(self.model)

    @torch.no_grad()
    def say(self, message: str, *, max_new_tokens: int = 512, streamer: TextStreamer | None = None, **sampling) -> str:
        """Return the model's answer to a message.

        Args:
            message: Message of the user.
            max_new_tokens: Largest number of tokens of the answer.
            streamer: Streamer that gets the tokens as they come.
            sampling: Options of `generate`.

        If it fails or is interrupted, the conversation is as before the message.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        if not text.startswith(self.text):  # the template rewrote earlier turns, which are read again
            self.clear()
            self.messages = messages[:-1]
        if self.text:
            new = token_ids(self.tokenizer, text[len(self.text) :], begins=False)
        else:
            new = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = torch.cat([self.ids, torch.tensor([new])], dim=1).to(self.model.device)
        options = STREAMED | sampling | cache_argument(self.cache)
        options |= {"max_new_tokens": max_new_tokens, "streamer": streamer}
        try:
            out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        except BaseException:
            self.cache = new_cache(self.model)  # the old one may hold a part of the answer
            raise
        self.ids = out.cpu()
        self.text = text + str(self.tokenizer.decode(out[0, prompt.shape[1] :]))
        answer = str(self.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


def chat(path: str | Path, *, device: str = "cpu", temperature: float = 0.7, top_p: float = 0.95) -> None:
    """Chat in the terminal until an empty line. The line /new starts a new conversation.

    Args:
        path: Folder of a model, folder of a run (its furthest stage), or hub id.
        device: Device of the model.
        temperature: Softmax temperature of sampling. With 0, the likeliest token is taken.
        top_p: Fraction of the probability mass to sample from.
    """
    tokenizer, options = load_tokenizer(path), sampling_options(temperature, top_p=top_p)
    conversation = Conversation(load_model(path, device=device), tokenizer)
    print("An empty line ends the conversation. /new starts a new one.")
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            return
        if not message:
            return
        if message == "/new":
            conversation.clear()
            continue
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        conversation.say(message, streamer=streamer, **options)
