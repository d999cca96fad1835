"""Which part of the long matrices the default suite runs. The rest is marked ``slow`` and ``matrix``.

A test named here runs for a given number of its parameter sets (0: only with ``-m slow``), or for as many as it takes
to use every value of every parameter once (``COVER``). Other tests run whole; most take less than a second.
"""

from collections import Counter
from collections.abc import Sequence

import pytest

COVER = -1

# By the file's name and the test's.
DEFAULT: dict[str, int] = {
    # attention
    "test_attention::test_equals_the_oracle": COVER,
    "test_attention_calls::test_a_call_outside_jit_takes_numpy_arrays_and_compiles_once": 2,
    "test_attention_calls::test_causal_at_the_bottom_right": 1,
    "test_attention_calls::test_defaults": 1,
    "test_attention_calls::test_every_way_to_say_the_same_mask": 2,
    "test_attention_errors::test_a_quantized_call_has_no_gradient_and_raises": 5,
    "test_attention_errors::test_key_weights_have_no_gradient_but_do_not_hinder_that_of_the_output": 1,
    "test_block_mask::test_a_batch_of_nothing_is_refused": 1,
    "test_block_mask::test_a_window_keeps_lists_short_and_loses_nothing": 1,
    "test_block_mask::test_lists_are_tight": 2,
    "test_block_mask::test_lists_are_tight_for_blocks_of_any_size": 2,
    "test_block_mask::test_lists_are_tight_where_an_axis_has_length_one": 1,
    "test_block_mask::test_positions_and_operands_of_every_shape": 2,
    "test_block_mask::test_transposed_lists_are_the_lists_of_the_transposed_relation": 2,
    "test_custom_functions::test_a_function_compiles_once_whatever_it_closes_over": COVER,
    "test_custom_functions::test_arrays_of_64_bits": 1,
    "test_custom_functions::test_masks": 3,
    "test_custom_functions::test_masks_in_the_algebra": 1,
    "test_custom_functions::test_parameters_and_what_is_closed_over_are_alike": 1,
    "test_custom_functions::test_parameters_of_integers_have_no_gradient": 1,
    "test_custom_functions::test_scores_and_their_gradients": 2,
    "test_custom_functions::test_scores_in_decode": 1,
    "test_custom_functions::test_vmap_keeps_the_row_of_an_element": 1,
    "test_custom_functions::test_vmap_of_what_is_closed_over": 0,
    "test_decode::test_equals_the_oracle": COVER,
    "test_decode::test_scores_sinks_and_trees": 1,
    "test_decode::test_splitting_changes_nothing_beyond_rounding": 2,
    "test_decode::test_vmap_equals_a_loop": 1,
    "test_decode::test_with_a_fixed_chunk_a_row_does_not_depend_on_the_others": 1,
    "test_derivatives::test_gradients_are_those_of_differences": 1,
    "test_derivatives::test_the_reference_has_derivatives_of_every_order_and_mode": 1,
    "test_flax::test_any_number_of_batch_axes": 1,
    "test_flax::test_linen_trains_the_same": 1,
    "test_flax::test_nnx_decodes_as_it_trains": 1,
    "test_flax::test_nnx_gives_the_same": 2,
    "test_flax::test_nnx_trains_the_same": 1,
    "test_gradients::test_equals_the_oracle": COVER,
    "test_gradients::test_the_same_call_gives_the_same_bits": 1,
    "test_paged::test_a_page_that_the_pool_does_not_have_is_empty": COVER,
    "test_paged::test_holes_within_a_row": 2,
    "test_paged::test_one_buffer_for_all_sequences": 1,
    "test_paged::test_pages_in_any_order": 2,
    "test_paged::test_pages_of_quantised_keys": 1,
    "test_paged::test_rows_share_pages": 2,
    "test_picture::test_every_block_has_the_tone_of_its_class": 1,
    "test_pointwise::test_a_score_of_tiles_is_that_of_every_pair": 6,
    "test_quantized_attention::test_attends_to_what_they_stand_for": 6,
    "test_quantized_attention::test_no_copy_of_the_whole_is_made": 1,
    "test_quantized_attention::test_vmap_is_a_loop": 1,
    "test_random_programs::test_random_programs_equal_the_oracle": COVER,
    "test_scores::test_a_function_may_look_at_positions_alone": 1,
    "test_scores::test_equals_the_oracle": COVER,
    "test_scores::test_several_parameters_of_one_function": 2,
    "test_scores::test_the_gradient_of_a_bias_is_summed_over_what_it_is_shared_by": 2,
    "test_shapes::test_head_sizes_equal_the_oracle_in_both_passes": 2,
    "test_shapes::test_head_sizes_lower_for_a_gpu": 2,
    "test_shapes::test_larger_heads_are_refused_by_name_and_served_by_default": 1,
    "test_shapes::test_the_largest_positions": 2,
    "test_sinks::test_a_sink_is_a_key_without_a_value": 1,
    "test_sinks::test_equals_the_oracle": COVER,
    "test_transformations::test_an_exported_program_gives_the_same_bits": 1,
    "test_transformations::test_shards_of_batch_and_heads_are_the_whole": 1,
    "test_tree_and_custom::test_a_function_equals_its_array": 1,
    "test_tree_and_custom::test_a_tree_sees_the_past_and_its_ancestors": 1,
    "test_vmap::test_equals_a_loop": 1,
    "test_vmap::test_gradients_of_shared_keys_and_values_are_summed": 0,
    "test_vmap::test_numpy_operands_are_like_others": 1,
    "test_vmap::test_shared_keys_and_values_are_not_copied": 1,
    "test_wide_numbers::test_ids_positions_and_lengths_of_64_bits_that_are_traced": 1,
    "test_wide_numbers::test_masks_of_far_positions": 20,
    "test_x64::test_a_process_with_the_flag_gives_the_same_bits": 0,
    "test_x64::test_both_passes_are_the_same": 1,
    "test_x64::test_both_passes_have_no_wide_number": 2,
    "test_x64::test_caches_are_the_same": 0,
    "test_x64::test_caches_have_no_wide_number": 2,
    "test_x64::test_decode_is_the_same": 0,
    "test_x64::test_kernels_for_cuda_are_the_same": 1,
    "test_x64::test_keys_however_they_are_stored_have_no_wide_number": COVER,
    "test_x64::test_vmap_has_no_wide_number": 2,
    # kernels
    "test_backward_machine_code::test_default_blocks_do_not_spill": 1,
    "test_backward_machine_code::test_gradients_of_scores_have_blocks_that_do_not_spill": 1,
    "test_backward_machine_code::test_kernels_with_scores_compile": 1,
    "test_decode_triton::test_key_weights_are_beside_out_and_lse_which_do_not_change": 0,
    "test_decode_triton::test_key_weights_come_from_the_same_pass": 1,
    "test_decode_triton::test_pages_in_any_order": 2,
    "test_decode_triton::test_quantised_keys_and_values": 2,
    "test_decode_triton::test_rows_of_a_group_share_a_tile": 1,
    "test_decode_triton::test_scores_know_the_head_of_every_row": 1,
    "test_decode_triton::test_wide_heads_of_eight_bits_come_in_halves_for_float32": 1,
    "test_gradient_poison::test_full_blocks_are_computed_without_the_mask": 1,
    "test_gradient_poison::test_poison_in_blocks_that_no_list_holds_changes_no_bit": 1,
    "test_gradient_poison::test_poison_in_what_is_not_there_changes_no_bit": 1,
    "test_gradient_poison::test_what_is_not_a_number_shows_in_gradients": 1,
    "test_key_weights::test_decode_has_them_from_the_same_pass": 1,
    "test_key_weights::test_equals_a_loop_over_pairs": 6,
    "test_key_weights::test_of_quantised_and_paged_keys": 1,
    "test_key_weights::test_they_sum_to_the_number_of_queries_that_see_a_key": 2,
    "test_key_weights::test_vmap_equals_a_loop": 1,
    "test_large_logits::test_both_passes": 1,
    "test_large_logits::test_decode_in_chunks": 1,
    "test_large_logits::test_rows_of_the_lowest_number_are_means_in_short_floats": 1,
    "test_machine_code::test_decode_copies_keys_as_they_are_stored": 1,
    "test_machine_code::test_default_blocks_do_not_spill": 2,
    "test_machine_code::test_entries_from_8_6_on_fit_into_99_kib_with_a_bias": 2,
    "test_machine_code::test_every_exponent_begins_with_a_rounded_difference": 1,
    "test_poison::test_poison_in_padding_changes_no_bit": 2,
    "test_triton_lowering::test_lowers_for_every_dtype": 4,
    "test_triton_lowering::test_lowers_with_keys_however_they_are_stored": COVER,
    "test_triton_lowering::test_lowers_with_what_users_write_as_a_mask": 3,
    "test_triton_lowering::test_lowers_with_what_users_write_as_a_score": 6,
    "test_work_follows_lists::test_each_list_is_read_once_and_masks_are_evaluated_for_its_partial_blocks": 2,
    "test_work_follows_lists::test_poison_outside_of_one_list_does_not_reach_its_queries": COVER,
    # caches
    "test_cache_gradients::test_a_packed_array_refuses_gradients": 1,
    "test_cache_gradients::test_a_quantized_cache_has_no_gradient_and_raises": 2,
    "test_cache_gradients::test_attention_through_a_cache_has_the_gradients_of_what_is_kept": 1,
    "test_cache_gradients::test_the_gradient_of_a_token_is_that_of_the_slots_that_show_it": 3,
    "test_cache_gradients::test_under_transformations": 1,
    "test_cache_keep::test_a_path_is_what_it_would_have_been_alone": 2,
    "test_cache_rows::test_attention_over_some_rows": 1,
    "test_cache_rows::test_copied_rows_are_what_a_fork_makes": 3,
    "test_cache_rows::test_some_rows_of_a_cache_equal_all_where_the_others_have_only_padding": 1,
    "test_cache_rows::test_some_rows_of_a_donated_cache_are_updated_in_place": 3,
    "test_checkpoints::test_a_checkpoint_policy_keeps_the_output_and_runs_no_forward_pass_again": 1,
    "test_checkpoints::test_a_scan_over_layers_with_one_block_mask": 1,
    "test_checkpoints::test_checkpoints_change_no_gradient": 1,
    "test_checkpoints::test_gradients_without_jit_are_those_with_it": 1,
    "test_pages::test_leaves_what_rows_of_their_own_would_hold": 1,
    "test_policies::test_a_query_sees_its_window_and_the_sinks_however_tokens_came_in": 3,
    "test_policies::test_any_program_leaves_what_lists_would_hold": 1,
    "test_storages::test_appending_to_a_donated_cache_copies_none_of_it": 4,
    "test_storages::test_attending_to_a_cache_copies_none_of_it": 2,
    "test_storages::test_steps_of_a_layer": 1,
    "test_storages::test_what_is_not_a_number_stays_in_its_slot_until_that_is_used_again": 3,
    # models
    "test_models_readme::test_another_process_finds_the_executables": 0,
    "test_models_x64::test_a_cached_decoder_gives_the_same": 0,
    "test_models_x64::test_a_generator_gives_the_same": 0,
    "test_models_x64::test_modules_of_flax_give_the_same": 0,
    "test_models_x64::test_the_executables_of_a_generator_have_no_wide_number": 2,
    "test_models_x64::test_the_self_check_of_the_command_line_is_the_same": 0,
    "test_wrong_kinds::test_a_hook_preserves_shape_and_dtype": 3,
    # decoder
    "test_cached_decoder::test_the_state_is_split_merged_and_saved": 1,
    "test_decoder::test_chunks_through_caches_equal_one_uncached_call": 1,
    "test_decoder::test_half_precision_stays_near_float32": 1,
    "test_decoder::test_logits_are_those_of_transformers": 2,
    "test_decoder::test_logits_are_those_of_transformers_live": 1,
    "test_decoder::test_padding_changes_nothing_at_real_tokens": 1,
    "test_decoder::test_the_head_can_be_applied_later": 1,
    "test_decoder_caches::test_a_prompt_much_longer_than_the_cache": 1,
    "test_decoder_caches::test_a_tree_is_verified_as_each_of_its_paths": 0,
    "test_decoder_caches::test_a_window_cache_of_a_layer_with_a_window_changes_nothing": 1,
    "test_decoder_caches::test_default_positions_of_some_rows_go_on_where_each_is": 0,
    "test_decoder_caches::test_fewer_bits_are_further_away": 0,
    "test_decoder_caches::test_in_bfloat16_the_cache_adds_no_error": 0,
    "test_decoder_caches::test_one_executable_updates_in_place": 1,
    "test_decoder_caches::test_some_rows_of_the_caches_equal_the_whole_batch": 1,
    "test_decoder_caches::test_stored_values_do_not_depend_on_policy_or_chunks": 0,
    "test_decoder_caches::test_with_enough_room_every_policy_equals_the_uncached_forward": 1,
    "test_decoder_gradients::test_a_cached_decoder_has_gradients": 0,
    "test_decoder_gradients::test_a_prefix_that_caches_hold_has_gradients": 0,
    "test_decoder_gradients::test_only_weights_above_a_quantized_cache_have_gradients": 0,
    "test_decoder_gradients::test_the_choice_of_heavy_hitters_is_a_constant": 0,
    "test_decoder_gradients::test_weights_have_the_gradients_of_a_decoder_without_caches": 1,
    # checkpoints
    "test_checkpoint::test_save_and_load_are_bitwise": 4,
    "test_checkpoint::test_transformers_loads_what_is_saved": 3,
    "test_checkpoint_replaced::test_stopped_at_every_file_operation": 4,
    # generation
    "test_generator_caches::test_a_row_does_not_depend_on_other_rows": 0,
    "test_generator_caches::test_requests_wait_for_pages": 0,
    "test_generator_caches::test_rows_may_be_longer_than_a_bounded_cache": 1,
    "test_generator_caches::test_window_layers_hold_only_the_window": 0,
    "test_generator_caches::test_with_enough_room_tokens_equal_dense": 0,
    "test_generator_transformers::test_options": 1,
    "test_guidance::test_a_plain_loop_that_runs_both_prompts": 1,
    "test_invalid::test_a_nan_row_ends_and_leaves_nothing_behind": 1,
    "test_invalid::test_guidance_of_any_strength_gives_numbers": 1,
    "test_invalid::test_the_tokens_before_are_kept": 1,
    "test_samples::test_each_sample_equals_a_request_with_its_seed": 1,
    "test_samples::test_seeds_go_on_from_the_last_to_the_first": 1,
    "test_sampling::test_only_settings_in_use_are_computed": 4,
    "test_sampling_transformers::test_every_step_of_a_generation": 4,
    "test_score::test_the_model_without_a_cache": 1,
    "test_serving::test_nothing_is_lost_under_load": 1,
    "test_speculation_caches::test_caches_are_updated_in_place": 1,
    "test_speculation_caches::test_caches_hold_the_accepted_tokens": 1,
    "test_speculation_distribution::test_common_random_numbers_agree_more_often_than_independent_ones": 1,
    "test_speculation_distribution::test_the_distribution_of_the_output_and_of_the_acceptance": 0,
    "test_speculation_outputs::test_a_trained_model_answers_the_same": 0,
    "test_speculation_outputs::test_another_draft_model_is_often_rejected": 0,
    "test_speculation_outputs::test_counts_are_those_of_a_replay": 1,
    "test_speculation_outputs::test_random_programs_compile_once_and_change_nothing": 1,
    "test_speculation_outputs::test_samples_of_one_prompt_equal_plain_decoding": 1,
    "test_speculation_outputs::test_the_output_equals_plain_decoding": 1,
    "test_stream::test_events_are_the_result": 2,
    "test_threads::test_an_iterator_that_is_collected_in_the_middle_of_a_step": 0,
    # text
    "test_chat_template::test_a_template_gets_bounded_time_and_memory": 7,
    "test_chat_template::test_an_undefined_name_is_an_error_with_its_line": 3,
    "test_chat_template::test_it_renders_like_transformers": 5,
    # training
    "test_train::test_a_batch_can_be_learned": 0,
    "test_train::test_a_seed_fixes_every_bit": 0,
    # command line
    "test_cache_options::test_generate_with_a_bounded_quantized_cache": 0,
    "test_cli::test_as_a_module_in_a_terminal_that_knows_only_ascii": 0,
    "test_cli_files::test_a_closed_or_full_stdout": 1,
    "test_cli_files::test_a_model_with_nan_weights": 1,
    "test_cli_generate::test_errors_are_one_line": 1,
    # bench
    "test_bench_check::test_right_results_are_correct": 2,
    "test_bench_machine::test_peaks_are_measured_in_both_dtypes": 2,
    "test_bench_peers::test_pallas_operations_compute_the_case": 2,
    "test_bench_peers::test_peers_compute_the_case": 11,
    "test_bench_run::test_a_case_that_breaks_does_not_stop_the_others": 0,
    "test_bench_run::test_a_copy_without_git_needs_a_revision": 0,
    "test_bench_run::test_a_peer_comes_too_late": 0,
    "test_bench_run::test_a_wrong_result_has_no_time": 1,
    "test_bench_run::test_peaks_are_measured_in_the_same_run": 0,
    "test_bench_semantics::test_like_flax": 1,
    "test_bench_semantics::test_like_jax_nn": 2,
    "test_bench_training::test_both_learn_the_same": 0,
    "test_bench_training::test_fractions_are_those_of_packed_documents": 0,
    "test_plot::test_every_picture_of_every_file_is_drawn": 0,
    "test_report::test_both_loops_of_the_backward_kernels_are_found": 1,
    "test_report::test_decode_copies_what_is_stored": 1,
    "test_report::test_plain_keys_and_values_are_copied_in_units_of_16_bytes": 1,
}


def left_out(items: Sequence[pytest.Function]) -> list[pytest.Function]:
    """The collected tests that only ``-m slow`` runs."""
    matrices: dict[str, list[pytest.Function]] = {}
    for item in items:
        # What this machine would skip is no part of the choice.
        if not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
            matrices.setdefault(f"{item.path.stem}::{item.originalname}", []).append(item)
    return [item for name, matrix in matrices.items() if name in DEFAULT for item in _left_out(matrix, DEFAULT[name])]


def _left_out(matrix: list[pytest.Function], wanted: int) -> list[pytest.Function]:
    """All but a choice that uses the values of every parameter about equally often."""
    if wanted == 0:
        return matrix
    rows = [item.callspec.params if hasattr(item, "callspec") else {} for item in matrix]
    values = [{(name, _known(value)) for name, value in row.items()} for row in rows]
    # The reference is the definition, and the last to break.
    is_reference = [any(isinstance(x, str) and x == "reference" for _, x in row) for row in values]
    uses: Counter = Counter()
    chosen: list[int] = []
    all_values = set().union(*values)
    while len(chosen) < len(matrix) and (len(chosen) < wanted or (wanted == COVER and uses.keys() < all_values)):
        rest = [n for n in range(len(matrix)) if n not in chosen]
        best = min(
            rest, key=lambda n: (-len(values[n] - uses.keys()), sum(uses[x] for x in values[n]), is_reference[n], n)
        )
        chosen.append(best)
        uses.update(values[best])
    return [item for n, item in enumerate(matrix) if n not in chosen]


def _known(value: object) -> object:
    """A key to compare a parameter by; an unhashable one equals only itself."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
