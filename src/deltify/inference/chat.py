"""A conversation in the terminal; the cache is kept between turns, so that nothing is read twice."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..model.modeling import DeltifyCache
from ..utils.folders import model_folder


class Conversation:
    """A model, what was said, and the cache of it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; use deltify generate for models that only continue text"
            )
        self.model, self.tokenizer = model, tokenizer
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.text = ""  # all that was said, as the template writes it
        self.ids = torch.empty(1, 0, dtype=torch.long)
        self.cache = DeltifyCache(config=self.model.config)

    @torch.no_grad()
    def say(self, message: str, *, max_new_tokens: int = 512, streamer: TextStreamer | None = None, **sampling) -> str:
        """The model's answer; only the new turn is read."""
        self.messages.append({"role": "user", "content": message})
        text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        if not text.startswith(self.text):  # a template that rewrites earlier turns: read them again
            kept = self.messages
            self.clear()
            self.messages = kept
        new = self.tokenizer(text[len(self.text) :], add_special_tokens=False, return_tensors="pt")["input_ids"]
        prompt = torch.cat([self.ids, new], dim=1).to(self.model.device)
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.cache,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **sampling,
        )
        self.ids = out.cpu()
        self.text = text + str(self.tokenizer.decode(out[0, prompt.shape[1] :]))
        answer = str(self.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def chat(path: str, *, device: str = "cpu", temperature: float = 0.7, top_p: float = 0.95) -> None:
    """Talks in the terminal until an empty line; /new starts over."""
    source = model_folder(path)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    conversation = Conversation(model, tokenizer)
    print("An empty line ends the conversation, /new starts a new one.")
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
        conversation.say(message, streamer=streamer, do_sample=True, temperature=temperature, top_p=top_p)
