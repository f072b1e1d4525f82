"""Sampling fields that full-attention diffusion models do not implement.

They are SGLang's, or another engine's: vLLM, TGI, llama.cpp, Ollama, transformers,
text-generation-webui, KoboldCpp, LMDeploy, TensorRT-LLM. A client that knows several
engines sends them with values that switch them off.
"""

from __future__ import annotations

from typing import Any

NOT_IMPLEMENTED = "full-attention diffusion models do not implement it"

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # Cuts and other shapes of the distribution.
    **dict.fromkeys(("min_p", "top_a", "epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("typical_p", "typical", "tfs", "tfs_z"), (1,)),
    **dict.fromkeys(("dynatemp_range", "smoothing_factor", "skew"), (0,)),
    **dict.fromkeys(("xtc_probability", "penalty_alpha", "nsigma"), (0,)),
    "top_n_sigma": (0, -1),
    "dynamic_temperature": (False,),
    "temperature_last": (False,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "guidance_scale": (1,),
    **dict.fromkeys(("negative_prompt", "samplers", "sampler_priority"), ()),
    **dict.fromkeys(("top_p_min", "top_p_decay", "top_p_reset_ids"), ()),
    **dict.fromkeys(("top_h", "adaptive_target", "preset"), ()),
    "renormalize_logits": (False,),
    # Penalties and banned tokens.
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (0,)),
    **dict.fromkeys(("repetition_penalty", "repeat_penalty"), (1,)),
    "encoder_repetition_penalty": (1,),
    "rep_pen": (1,),
    **dict.fromkeys(("no_repeat_ngram_size", "repetition_ngram_size"), (0,)),
    "encoder_no_repeat_ngram_size": (0,),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), ()),
    **dict.fromkeys(("sequence_bias", "embedding_bias"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "forced_bos_token_id"), ()),
    **dict.fromkeys(("forced_eos_token_id", "eos_token_id", "end_id"), ()),
    "dry_multiplier": (0,),
    **dict.fromkeys(("bad_words_ids", "custom_token_bans"), ()),
    "logits_processors": (),
    "ban_eos_token": (False,),
    # Beams and several candidates.
    **dict.fromkeys(("best_of", "num_beams", "beam_width", "num_beam_groups"), (1,)),
    "num_return_sequences": (1,),
    "length_penalty": (1,),
    "diversity_penalty": (0,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    # Lengths and prompts.
    **dict.fromkeys(("min_tokens", "min_new_tokens", "min_length"), (0,)),
    **dict.fromkeys(("n_predict", "num_predict"), (-1,)),
    **dict.fromkeys(("max_new_tokens", "max_length", "max_tokens_second"), ()),
    **dict.fromkeys(("max_completion_tokens", "max_output_tokens", "max_gen_len"), ()),
    **dict.fromkeys(("max_time", "t_max_predict_ms"), (0,)),
    **dict.fromkeys(("stop_strings", "stop_sequences"), ()),
    **dict.fromkeys(("system", "instructions", "documents"), ()),
    **dict.fromkeys(("chat_template", "instruction_template", "character"), ()),
    **dict.fromkeys(("prompt_truncate_len", "max_input_tokens", "transforms"), ()),
    "add_generation_prompt": (True,),
    **dict.fromkeys(("num_ctx", "n_ctx", "truncate", "truncate_prompt_tokens"), ()),
    "auto_max_new_tokens": (False,),
    "add_special_tokens": (True,),
    "add_bos_token": (True,),
    "echo": (False,),
    "return_full_text": (False,),
    "suffix": (),
    # Log probabilities and what else comes back.
    "logprobs": (False,),
    "top_logprobs": (0,),
    "top_logprobs_num": (0,),
    "n_probs": (0,),
    "logprob_start_len": (-1,),
    "prompt_logprobs": (False,),
    "return_logprob": (False,),
    "return_sampling_mask": (False,),
    "decoder_input_details": (False,),
    "top_n_tokens": (0,),
    "detokenize": (True,),
    "spaces_between_special_tokens": (True,),
    # Guided decoding and tools.
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice"), ()),
    **dict.fromkeys(("guided_grammar", "structured_outputs", "grammar"), ()),
    **dict.fromkeys(("choice", "structural_tag", "json_schema"), ()),
    "json_object": (False,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": (),
    "function_call": ("auto", "none"),
    # Other parts of an answer, and how it is computed.
    "modalities": (["text"],),
    **dict.fromkeys(("prediction", "audio", "web_search_options"), ()),
    **dict.fromkeys(("thinking_budget", "max_thinking_tokens"), ()),
    **dict.fromkeys(("thinking_token_budget", "reasoning_budget"), (-1,)),
    **dict.fromkeys(("lora", "adapter_id"), ()),
    **dict.fromkeys(("sampling_seed", "random_seed"), ()),
    "priority": (0,),
    "watermark": (False,),
    "prompt_lookup_num_tokens": (0,),
    "lookahead_config": (),
    # Ours, outside of custom_params.
    "dllm": (),
}
"""The values of each that change nothing, beside null and SGLang's own default. An
empty string, list or object changes nothing either, where these are no numbers."""

MODIFIERS = frozenset(
    {
        *("mirostat_tau", "mirostat_eta", "dynatemp_low", "dynatemp_high"),
        *("dynatemp_exponent", "xtc_threshold", "smoothing_curve"),
        *("dry_base", "dry_allowed_length", "dry_sequence_breakers"),
        *("dry_penalty_last_n", "repeat_last_n", "repetition_penalty_range"),
        *("repetition_decay", "repetition_ngram_threshold", "penalize_newline"),
        *("rep_pen_range", "rep_pen_slope", "min_keep", "guided_decoding_backend"),
        *("guided_whitespace_pattern", "pad_id", "cache_prompt", "n_keep"),
    }
)
"""Fields that only change the effect of one above, which is off."""
