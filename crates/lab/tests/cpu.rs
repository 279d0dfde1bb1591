//! The CPU backend against the float64 reference, through the public API.

use flex_block_attn::expression::{Expression, kv, q};
use flex_block_attn::{BlockMask, Extents, bf16, builders, f16};
use flex_block_attn_lab::cases::{Case, Number};
use flex_block_attn_lab::reference::Sizes;
use flex_block_attn_lab::rules::{causal, dilated_window, documents_with_prefix, neighbourhood};
use proptest::prelude::*;

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (
        1usize..3,
        1usize..3,
        1usize..4,
        0usize..150,
        0usize..300,
        1usize..10,
    );
    let blocks = (1usize..6, 1usize..10);
    let mask = (any::<bool>(), any::<bool>(), 0.0f64..1.0, any::<u64>());
    (sizes, blocks, mask, -1.0f64..1.0, 1usize..4).prop_map(
        |((batch, kv_heads, group, q_len, kv_len, dim), (q, kv), mask, scale, threads)| {
            let (per_batch, per_head, density, seed) = mask;
            let sizes = Sizes {
                batch,
                q_heads: kv_heads * group,
                kv_heads,
                q_len,
                kv_len,
                head_dim: 8 * dim,
            };
            let extents = Extents::new(q_len, kv_len, 16 * q, 16 * kv).unwrap();
            let (mask_batch, mask_heads) = (
                if per_batch { batch } else { 1 },
                if per_head { sizes.q_heads } else { 1 },
            );
            let mut mask =
                builders::random(extents, mask_batch, mask_heads, density, seed).unwrap();
            if density < 0.3 && extents.q_blocks() > 0 {
                mask = without_row(&mask, seed as usize % extents.q_blocks());
            }
            Case {
                sizes,
                mask,
                scale,
                seed,
                threads,
            }
        },
    )
}

/// The same mask with no key for one row of blocks.
fn without_row(mask: &BlockMask, empty: usize) -> BlockMask {
    let rows = mask.extents().q_blocks();
    let lists: Vec<Vec<usize>> = (0..mask.batch() * mask.heads() * rows)
        .map(|i| match i % rows {
            row if row == empty => Vec::new(),
            row => mask
                .row(i / rows / mask.heads(), i / rows % mask.heads(), row)
                .collect(),
        })
        .collect();
    BlockMask::from_row_lists(mask.extents(), mask.batch(), mask.heads(), &lists).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn equals_the_reference(case in cases()) {
        for difference in [
            case.difference::<f32>(),
            case.difference::<f64>(),
            case.difference::<bf16>(),
            case.difference::<f16>(),
        ] {
            prop_assert_eq!(difference, None);
        }
    }
}

/// Every head_dim there is, small and large blocks, tiles that do not divide.
#[test]
fn every_head_dim() {
    for head_dim in (8..=256).step_by(8) {
        let sizes = Sizes {
            batch: 1,
            q_heads: 1,
            kv_heads: 1,
            q_len: 70,
            kv_len: 150,
            head_dim,
        };
        let extents = Extents::new(70, 150, 48, 80).unwrap();
        let mask = builders::full(extents);
        let case = Case {
            sizes,
            mask,
            scale: 0.1,
            seed: head_dim as u64,
            threads: 2,
        };
        assert_eq!(
            case.difference_from_exact::<f32>(),
            None,
            "head_dim {head_dim}"
        );
        assert_eq!(
            case.difference_from_exact::<bf16>(),
            None,
            "head_dim {head_dim}"
        );
    }
}

/// Tiles of 128 by 128 are crossed in both directions, and heads by far.
#[test]
fn long_rows_and_large_blocks() {
    for (q_block, kv_block) in [(384, 384), (16, 384), (384, 16), (128, 64), (64, 640)] {
        let sizes = Sizes {
            batch: 1,
            q_heads: 2,
            kv_heads: 1,
            q_len: 700,
            kv_len: 900,
            head_dim: 64,
        };
        let extents = Extents::new(700, 900, q_block, kv_block).unwrap();
        let mask = builders::random(extents, 1, 2, 0.6, 3).unwrap();
        for threads in [1, 2, 5] {
            let case = Case {
                sizes,
                mask: mask.clone(),
                scale: 0.125,
                seed: 9,
                threads,
            };
            assert_eq!(
                case.difference::<f32>(),
                None,
                "blocks {q_block} x {kv_block}"
            );
        }
    }
}

/// Masks with an expression: small blocks joined in a tile, large ones cut, queries without any key.
#[test]
fn expressions() {
    let tokens = 330;
    let mut checked = 0;
    for rule in [
        causal(),
        dilated_window(50),
        neighbourhood(6, 11),
        documents_with_prefix(tokens, 2, 4),
    ] {
        for (q_block, kv_block) in [(16, 16), (64, 48), (128, 128), (48, 384), (384, 16)] {
            let extents = Extents::new(tokens, tokens, q_block, kv_block).unwrap();
            let mask = BlockMask::from_expression(extents, 2, 4, &rule.expression()).unwrap();
            let case = Case {
                sizes: Sizes {
                    batch: 2,
                    q_heads: 4,
                    kv_heads: 2,
                    q_len: tokens,
                    kv_len: tokens,
                    head_dim: 24,
                },
                mask,
                scale: if q_block == 64 { -0.3 } else { 0.3 },
                seed: 4,
                threads: 2,
            };
            checked += case.mask.count_partial();
            let name = format!("{q_block} x {kv_block}: {:?}", case.mask);
            assert_eq!(case.difference::<f32>(), None, "{name}");
            assert_eq!(case.difference::<f64>(), None, "{name}");
            assert_eq!(case.difference::<bf16>(), None, "{name}");
            assert_eq!(case.difference::<f16>(), None, "{name}");
        }
    }
    assert!(checked > 1000, "{checked} partial blocks");
}

/// Queries of a block that see nothing among others that do, and some that see nothing in a first tile.
#[test]
fn queries_that_see_nothing_of_a_block() {
    let even = (q() % 2).equals(0);
    for condition in [
        even.clone() & kv().at_most(q()),
        kv().at_least(q() + 20),
        even & kv().more_than(140) & kv().less_than(150),
        q().less_than(3) & kv().equals(170),
    ] {
        let expression = Expression::new(&condition).unwrap();
        for block in [16, 128] {
            let extents = Extents::new(180, 180, block, block).unwrap();
            let case = Case {
                sizes: Sizes {
                    batch: 1,
                    q_heads: 1,
                    kv_heads: 1,
                    q_len: 180,
                    kv_len: 180,
                    head_dim: 16,
                },
                mask: BlockMask::from_expression(extents, 1, 1, &expression).unwrap(),
                scale: 0.4,
                seed: 6,
                threads: 2,
            };
            let results = case.run::<f32>();
            assert!(results.lse.contains(&f64::NEG_INFINITY), "{expression}");
            assert_eq!(case.difference::<f32>(), None, "{expression}");
            assert_eq!(case.difference::<f64>(), None, "{expression}");
            assert_eq!(case.difference::<bf16>(), None, "{expression}");
        }
    }
}

/// Scores of hundreds: the running maximum must hold them.
#[test]
fn large_scores_do_not_overflow() {
    let sizes = Sizes {
        batch: 1,
        q_heads: 1,
        kv_heads: 1,
        q_len: 40,
        kv_len: 300,
        head_dim: 32,
    };
    let extents = Extents::new(40, 300, 16, 16).unwrap();
    for scale in [30.0, -30.0, 0.0] {
        let mask = builders::full(extents);
        let case = Case {
            sizes,
            mask,
            scale,
            seed: 5,
            threads: 1,
        };
        assert_eq!(case.difference::<f64>(), None, "scale {scale}");
        let results = case.run::<f32>();
        assert!(
            results
                .out
                .iter()
                .chain(&results.lse)
                .all(|value| value.is_finite())
        );
    }
}

/// The same problem twice gives the same bits; so do other numbers of threads, forward.
#[test]
fn results_repeat() {
    let sizes = Sizes {
        batch: 2,
        q_heads: 3,
        kv_heads: 3,
        q_len: 200,
        kv_len: 200,
        head_dim: 40,
    };
    let extents = Extents::new(200, 200, 32, 32).unwrap();
    let mask = builders::random(extents, 2, 3, 0.4, 1).unwrap();
    let case = |threads| Case {
        sizes,
        mask: mask.clone(),
        scale: 0.2,
        seed: 2,
        threads,
    };
    let first = case(4).run::<f32>();
    for _ in 0..5 {
        assert_eq!(first, case(4).run::<f32>());
    }
    for threads in 1..4 {
        let other = case(threads).run::<f32>();
        assert_eq!((&first.out, &first.lse), (&other.out, &other.lse));
    }
}

/// NaN in a key reaches the queries that see it, and no others.
#[test]
fn nan_spreads_as_far_as_the_mask() {
    fn check<T: Number>() {
        use flex_block_attn::{Options, Plan, Tensor, TensorMut, forward};
        let (tokens, dim) = (64, 16);
        let shape = [1, 1, tokens, dim];
        let mut k = vec![T::from_f64(0.5); tokens * dim];
        k[40 * dim + 3] = T::from_f64(f64::NAN);
        let extents = Extents::new(tokens, tokens, 16, 16).unwrap();
        let mask =
            BlockMask::from_blocks(extents, [(0, 0), (1, 2), (2, 0), (2, 2), (3, 3)]).unwrap();
        let (mut out, mut lse) = (vec![T::default(); k.len()], vec![T::Lse::default(); tokens]);
        forward(
            Tensor::new(&k, shape).unwrap(),
            Tensor::new(&k, shape).unwrap(),
            Tensor::new(&k, shape).unwrap(),
            Plan::new(&mask).view(),
            &Options::default(),
            TensorMut::new(&mut out, shape).unwrap(),
            TensorMut::new(&mut lse, [1, 1, tokens, 1]).unwrap(),
        )
        .unwrap();
        for (query, out) in out.chunks(dim).enumerate() {
            let sees_nan = (16..48).contains(&query);
            assert_eq!(
                out.iter().all(|x| x.to_f64().is_nan()),
                sees_nan,
                "query {query}"
            );
            assert_eq!(
                out.iter().any(|x| x.to_f64().is_nan()),
                sees_nan,
                "query {query}"
            );
        }
    }
    check::<f32>();
    check::<f64>();
    check::<bf16>();
    check::<f16>();
}
