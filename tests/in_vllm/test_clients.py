"""What the clients of a server with a plan see, and that it ends well when it is told to."""

from pathlib import Path

from running import serving

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_openai_client(folder: Path) -> None:
    """Several prompts at once, what is streamed and what is not, and a chat, all say the same."""
    import openai  # which vLLM brings along

    with serving(folder, "--chat-template", TEMPLATE, NARROWCAST_PLAN=str(folder / "int4.plan")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        options = {"model": "model", "max_tokens": 12, "temperature": 0}
        prompts = ["It was a dark", "The king"]
        together = client.completions.create(prompt=prompts, logprobs=1, echo=True, **options).choices
        for prompt, choice in zip(prompts, together, strict=True):
            assert choice.text.startswith(prompt)
            assert all(score < 0 for score in choice.logprobs.token_logprobs[1:])
            parts = client.completions.create(prompt=prompt, stream=True, **options)
            streamed = "".join(part.choices[0].text for part in parts)
            assert prompt + streamed == choice.text
            chat = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **options)
            assert chat.choices[0].message.content
        server.process.terminate()
        assert server.process.wait(60) == 0, "told to end, it ends well"
