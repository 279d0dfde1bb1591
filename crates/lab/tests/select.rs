//! Masks chosen by what tokens hold, against the formulas in float64, pair by pair.

use flex_block_attn::builders::{self, StaCanvas};
use flex_block_attn::select::{
    Choice, LEAST_BLOCKS, Pooled, Scores, Scoring, TEMPERATURE, tiles_in_place, video_tiles,
};
use flex_block_attn::{BlockMask, Error, Extents, Padding, Tensor, Video, bf16, f16};
use flex_block_attn_lab::cases::{Case, Number};
use flex_block_attn_lab::reference::Sizes;
use proptest::prelude::*;

/// A tile of 2 x 2 x 4 tokens.
const TILE: [usize; 3] = [2, 2, 4];

/// A video of tiles with text, and how they are chosen.
#[derive(Debug, Clone)]
struct Setting {
    sizes: Sizes,
    canvas: StaCanvas,
    choice: Choice,
    seed: u64,
}

fn settings() -> impl Strategy<Value = Setting> {
    let sizes = (1usize..3, 1usize..3, 1usize..3, 1usize..4);
    let canvas = ((1usize..4, 1usize..4, 1usize..5), 0usize..40);
    let scoring = prop_oneof![
        Just(Scoring::Similarity),
        (0.0..=1.0f64).prop_map(|mass| Scoring::Mass { mass }),
        (0.0..=1.0f64).prop_map(|lambda| Scoring::Importance { lambda }),
    ];
    let cells = prop_oneof![
        Just(None),
        [1usize..4, 1usize..4, 1usize..4].prop_map(|cells| Some([TILE, cells])),
    ];
    let choice = (1usize..30, scoring, cells, any::<bool>(), 1usize..4);
    (sizes, canvas, choice, any::<u64>()).prop_map(
        |((batch, kv_heads, group, dim), ((t, h, w), text), choice, seed)| {
            let (top, scoring, cells, share_heads, threads) = choice;
            let canvas = StaCanvas {
                tiles: [t, h, w],
                window: [3, 1, 3],
                tile_tokens: TILE.iter().product(),
                text_tokens: text,
            };
            let len = canvas.extents().unwrap().q_len();
            Setting {
                sizes: Sizes {
                    batch,
                    q_heads: kv_heads * group,
                    kv_heads,
                    q_len: len,
                    kv_len: len,
                    head_dim: 8 * dim,
                },
                canvas,
                choice: Choice {
                    top,
                    scoring,
                    cells,
                    share_heads,
                    threads: std::num::NonZeroUsize::new(threads),
                },
                seed,
            }
        },
    )
}

/// (batch, heads, blocks) of features.
type Features = Vec<Vec<Vec<Vec<f64>>>>;

fn mean(rows: &[&[f64]]) -> Vec<f64> {
    (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column]).sum::<f64>() / rows.len() as f64)
        .collect()
}

/// The means of each tile's cells, rounded to `T`.
fn features<T: Number>(setting: &Setting, values: &[T], heads: usize) -> Features {
    let Setting { sizes, canvas, .. } = setting;
    let wide: Vec<f64> = values.iter().map(|value| value.to_f64()).collect();
    let tokens = |b: usize, h: usize| &wide[(b * heads + h) * sizes.q_len * sizes.head_dim..];
    let [tile, cells] = setting.choice.cells.unwrap_or([TILE, [1, 1, 1]]);
    let covers = |axis: usize, cell: usize, at: usize| {
        let (n, p) = (tile[axis] as f64, cells[axis] as f64);
        let (first, last) = (
            (cell as f64 * n / p).floor(),
            ((cell + 1) as f64 * n / p).ceil(),
        );
        (first..last).contains(&(at as f64))
    };
    let block = |b: usize, h: usize, number: usize| -> Vec<f64> {
        let mut all = Vec::new();
        for cell in 0..cells.iter().product() {
            let cell = [
                cell / (cells[1] * cells[2]),
                cell / cells[2] % cells[1],
                cell % cells[2],
            ];
            let rows: Vec<&[f64]> = (0..canvas.tile_tokens)
                .filter(|at| {
                    let place = [
                        at / (tile[1] * tile[2]),
                        at / tile[2] % tile[1],
                        at % tile[2],
                    ];
                    (0..3).all(|axis| covers(axis, cell[axis], place[axis]))
                })
                .map(|at| {
                    let token = number * canvas.tile_tokens + at;
                    &tokens(b, h)[token * sizes.head_dim..][..sizes.head_dim]
                })
                .collect();
            all.extend(
                mean(&rows)
                    .into_iter()
                    .map(|value| T::from_f64(value).to_f64()),
            );
        }
        all
    };
    let tiles = canvas.tiles.iter().product();
    let features: Features = (0..sizes.batch)
        .map(|b| {
            (0..heads)
                .map(|h| (0..tiles).map(|i| block(b, h, i)).collect())
                .collect()
        })
        .collect();
    if !setting.choice.share_heads {
        return features;
    }
    let shared = |one: &Vec<Vec<Vec<f64>>>, tile: usize| {
        mean(
            &one.iter()
                .map(|head| head[tile].as_slice())
                .collect::<Vec<_>>(),
        )
    };
    let over_heads = |one| vec![(0..tiles).map(|tile| shared(one, tile)).collect()];
    features.iter().map(over_heads).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

/// Scores of one row, by the formulas as their authors put them.
fn scores(scoring: Scoring, q: &[f64], keys: &[Vec<f64>]) -> Vec<f64> {
    let likeness = |a: &[f64], b: &[f64]| (cosine(a, b) + 1.0) / 2.0;
    let score = |(j, key): (usize, &Vec<f64>)| match scoring {
        Scoring::Importance { lambda } => {
            let others = keys.iter().enumerate().filter(|&(l, _)| l != j);
            let sum: f64 = others.map(|(_, other)| likeness(other, key)).sum();
            let redundancy = sum / (keys.len() - 1).max(1) as f64;
            lambda * likeness(q, key) - (1.0 - lambda) * redundancy
        }
        _ => dot(q, key),
    };
    keys.iter().enumerate().map(score).collect()
}

/// How many blocks a row keeps.
fn count(choice: &Choice, scores: &[f64]) -> usize {
    let most = choice.top.min(scores.len());
    let Scoring::Mass { mass } = choice.scoring else {
        return most;
    };
    let mut sorted = scores.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let weights: Vec<f64> = sorted
        .iter()
        .map(|score| ((score - sorted[0]) / TEMPERATURE).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let mut sum = 0.0;
    let reached = weights.iter().position(|weight| {
        sum += weight / total;
        sum >= mass
    });
    reached.map_or(most, |last| (last + 1).max(LEAST_BLOCKS).min(most))
}

/// Compares the video part of a mask. Where scores lie closer together than rounding leaves
/// certain, another block may be chosen: each of those must be such a near-tie.
fn compare<T: Number>(setting: &Setting, tie: f64) -> Result<(), TestCaseError> {
    let Setting {
        sizes,
        canvas,
        choice,
        seed,
    } = setting;
    let tiles: usize = canvas.tiles.iter().product();
    let case = Case {
        sizes: *sizes,
        mask: builders::full(canvas.extents().unwrap()),
        scale: 1.0,
        seed: *seed,
        threads: 1,
    };
    let len = |shape: [usize; 4]| shape.iter().product();
    let q: Vec<T> = case.values(0, len(sizes.q_shape()));
    let k: Vec<T> = case.values(1, len(sizes.kv_shape()));
    let (q_tokens, k_tokens) = (
        Tensor::new(&q, sizes.q_shape()).unwrap(),
        Tensor::new(&k, sizes.kv_shape()).unwrap(),
    );
    let mask = video_tiles(q_tokens, k_tokens, canvas, choice).unwrap();

    let q = features(setting, &q, sizes.q_heads);
    let k = features(setting, &k, sizes.kv_heads);
    prop_assert_eq!((mask.batch(), mask.heads()), (sizes.batch, q[0].len()));
    for (b, heads) in q.iter().enumerate() {
        for (h, rows) in heads.iter().enumerate() {
            let keys = &k[b][h / (heads.len() / k[b].len())];
            for (row, query) in rows.iter().enumerate() {
                let scores = scores(choice.scoring, query, keys);
                let wanted = count(choice, &scores);
                let mut best: Vec<usize> = (0..tiles).collect();
                best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
                let got: Vec<usize> = mask.row(b, h, row).take_while(|&c| c < tiles).collect();
                prop_assert!(
                    got.len().abs_diff(wanted) <= 1,
                    "{} of {}",
                    got.len(),
                    wanted
                );
                if got.len() == wanted {
                    let last = scores[best[wanted - 1]];
                    let scale = scores
                        .iter()
                        .fold(1e-30f64, |most, score| most.max(score.abs()));
                    for (column, score) in scores.iter().enumerate() {
                        let near = (score - last).abs() < tie * scale;
                        let kept = best[..wanted].contains(&column);
                        prop_assert!(got.contains(&column) == kept || near, "{row}, {column}");
                    }
                } else {
                    let by_mass = matches!(choice.scoring, Scoring::Mass { .. });
                    prop_assert!(by_mass);
                }
            }
        }
    }
    let blocks = mask.extents().kv_blocks();
    for at in 0..blocks {
        for text in tiles..blocks {
            prop_assert!(mask.contains(0, 0, at, text) && mask.contains(0, 0, text, at));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn tiles_are_chosen_by_the_formulas(setting in settings()) {
        compare::<f32>(&setting, 1e-5)?;
        compare::<f64>(&setting, 1e-5)?;
        compare::<bf16>(&setting, 1e-2)?;
        compare::<f16>(&setting, 2e-3)?;
    }
}

/// For each place of each tile the token there, `None` beside the video.
fn places(video: &Video) -> Vec<Option<usize>> {
    let (tiles, [time, height, width]) = (video.tiles(), video.thw);
    let number = |at: usize, n: [usize; 3]| [at / (n[1] * n[2]), at / n[2] % n[1], at % n[2]];
    let count = tiles.iter().product::<usize>() * video.block();
    (0..count)
        .map(|place| {
            let corner = number(place / video.block(), tiles);
            let inner = number(place % video.block(), video.tile);
            let at = |axis| corner[axis] * video.tile[axis] + inner[axis];
            let [t, h, w] = std::array::from_fn(at);
            (t < time && h < height && w < width).then_some((t * height + h) * width + w)
        })
        .collect()
}

/// Tokens put tile by tile, zeros beside the video, and the text behind.
fn in_tiles<T: Number>(values: &[T], video: &Video, head_dim: usize) -> Vec<T> {
    let mut tiled = Vec::new();
    let text = video.tokens() - video.text_len;
    for head in values.chunks_exact(video.tokens() * head_dim) {
        for token in places(video) {
            match token {
                Some(token) => tiled.extend_from_slice(&head[token * head_dim..][..head_dim]),
                None => tiled.extend(vec![T::from_f64(0.0); head_dim]),
            }
        }
        tiled.extend_from_slice(&head[text * head_dim..]);
    }
    tiled
}

fn compare_in_place<T: Number>(setting: &Setting, video: &Video) -> Result<(), TestCaseError> {
    let Setting { sizes, choice, .. } = setting;
    let canvas = StaCanvas {
        tiles: video.tiles(),
        window: [1, 1, 1],
        tile_tokens: video.block(),
        text_tokens: video.text_len,
    };
    let case = Case {
        sizes: *sizes,
        mask: builders::full(canvas.extents().unwrap()),
        scale: 1.0,
        seed: setting.seed,
        threads: 1,
    };
    let shape = |heads, tokens| [sizes.batch, heads, tokens, sizes.head_dim];
    let [q, k] = [(0, sizes.q_heads), (1, sizes.kv_heads)].map(|(which, heads)| {
        let lying = shape(heads, video.tokens());
        let values: Vec<T> = case.values(which, lying.iter().product());
        let tiled = in_tiles(&values, video, sizes.head_dim);
        ((values, lying), (tiled, shape(heads, video.places())))
    });
    let tensor = |(values, shape)| Tensor::new(values, shape).unwrap();
    let lying = [&q.0, &k.0].map(|(values, shape)| tensor((values, *shape)));
    let tiled = [&q.1, &k.1].map(|(values, shape)| tensor((values, *shape)));
    let got = tiles_in_place(lying[0], lying[1], video, choice).unwrap();
    let expected = video_tiles(tiled[0], tiled[1], &canvas, choice).unwrap();
    prop_assert!(got == expected);

    // Means without padding: of the tokens that there are.
    let exact = Video {
        padding: Padding::Exact,
        ..*video
    };
    let pooled = Pooled::video(lying[1], &exact, [1; 3], None).unwrap();
    let [_, _, tiles, head_dim] = pooled.shape();
    let wide: Vec<f64> = k.0.0.iter().map(|value| value.to_f64()).collect();
    let heads = wide.chunks_exact(video.tokens() * head_dim);
    let means = pooled.values().chunks_exact(tiles * head_dim);
    for (head, means) in heads.zip(means) {
        let means = means.chunks_exact(head_dim);
        for (tile, got) in places(video).chunks_exact(video.block()).zip(means) {
            let there: Vec<&[f64]> = tile
                .iter()
                .flatten()
                .map(|token| &head[token * head_dim..][..head_dim])
                .collect();
            for (got, expected) in got.iter().zip(mean(&there)) {
                prop_assert!(
                    (f64::from(*got) - expected).abs() < 1e-2,
                    "{got}, {expected}"
                );
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn tiles_of_tokens_as_they_lie_are_those_of_tokens_in_tiles(
        setting in settings(),
        thw in [1usize..6, 1usize..6, 1usize..10],
        text_len in 0usize..40,
    ) {
        let video = Video { thw, tile: TILE, text_len, padding: Padding::Zero };
        compare_in_place::<f32>(&setting, &video)?;
        compare_in_place::<bf16>(&setting, &video)?;
    }
}

#[test]
fn ssta_is_the_union_and_padded_text_is_cut() {
    let canvas = StaCanvas {
        tiles: [1, 4, 4],
        window: [1, 3, 1],
        tile_tokens: 16,
        text_tokens: 40,
    };
    let shape = [2, 1, canvas.extents().unwrap().q_len(), 8];
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|i: usize| (i as f32).cos())
        .collect();
    let tokens = Tensor::new(&values, shape).unwrap();
    let chosen = video_tiles(
        tokens,
        tokens,
        &canvas,
        &Choice::new(2, Scoring::Similarity),
    )
    .unwrap();
    let sliding = builders::sta(&canvas).unwrap();
    let both = chosen.union(&sliding).unwrap();
    let cut = builders::without_padded_text(&both, 16, &[40, 3]).unwrap();
    for row in 0..19 {
        for column in 0..19 {
            let kept = chosen.contains(1, 0, row, column) || sliding.contains(0, 0, row, column);
            assert_eq!(both.contains(1, 0, row, column), kept);
            let padded = row > 16 || column > 16;
            let expected = if padded { row == column } else { kept };
            assert_eq!(cut.contains(1, 0, row, column), expected);
            assert_eq!(
                cut.contains(0, 0, row, column),
                both.contains(0, 0, row, column)
            );
        }
    }
}

#[test]
fn a_block_of_zero_mean_scores_zero() {
    let mut values = vec![1.0f32; 4 * 16 * 8];
    values[16 * 8..32 * 8].fill(0.0);
    let tokens = Tensor::new(&values, [1, 1, 64, 8]).unwrap();
    let pooled = Pooled::blocks(tokens, 16, None).unwrap();
    let scores = Scores::importance(&pooled, &pooled, 1.0).unwrap();
    for (at, &score) in scores.values().iter().enumerate() {
        let zero = at / 4 == 1 || at % 4 == 1;
        assert!((score - f32::from(!zero)).abs() < 1e-6);
    }
}

#[test]
fn a_short_last_block_is_pooled_over_its_own_tokens() {
    let values: Vec<f32> = (0..20 * 2).map(|i| (i / 2) as f32).collect();
    let tokens = Tensor::new(&values, [1, 1, 20, 2]).unwrap();
    let pooled = Pooled::blocks(tokens, 16, None).unwrap();
    assert_eq!(pooled.shape(), [1, 1, 2, 2]);
    assert_eq!(pooled.values(), [7.5, 7.5, 17.5, 17.5]);
    let all = Pooled::blocks(tokens, usize::MAX, None).unwrap();
    assert_eq!(all.values(), [9.5, 9.5]);
}

#[test]
fn mistakes_are_named() {
    let canvas = StaCanvas {
        tiles: [1, 2, 2],
        window: [1, 1, 1],
        tile_tokens: 16,
        text_tokens: 0,
    };
    let values = vec![0.5f32; 2 * 64 * 8];
    let tokens = |shape| Tensor::new(&values, shape).unwrap();
    let right = tokens([1, 2, 64, 8]);
    let text = |result: Result<BlockMask, Error>| result.unwrap_err().to_string();
    let choose = |choice: Choice| text(video_tiles(right, right, &canvas, &choice));
    let similar = Choice::new(1, Scoring::Similarity);
    assert_eq!(
        choose(Choice { top: 0, ..similar }),
        "top must be at least 1, got 0"
    );
    assert_eq!(
        choose(Choice::new(1, Scoring::Importance { lambda: 2.0 })),
        "lambda must be from 0 to 1, got 2"
    );
    assert_eq!(
        choose(Choice::new(1, Scoring::Mass { mass: -1.0 })),
        "mass must be from 0 to 1, got -1"
    );
    assert_eq!(
        choose(Choice {
            cells: Some([[2, 2, 2], [1, 1, 1]]),
            ..similar
        }),
        "cells must be of the canvas' tile_tokens, got [2, 2, 2]"
    );
    assert_eq!(
        choose(Choice {
            cells: Some([TILE, [1, 0, 1]]),
            ..similar
        }),
        "cells must be three positive numbers, got [1, 0, 1]"
    );
    let short = tokens([1, 2, 63, 8]);
    assert_eq!(
        text(video_tiles(right, short, &canvas, &similar)),
        "k must be at least the canvas' tiles long, got 63 tokens"
    );
    assert_eq!(
        text(video_tiles(tokens([1, 1, 64, 8]), right, &canvas, &similar)),
        "q has 1 heads, which is no multiple of the 2 heads of k and v"
    );
    let thin = Tensor::strided(&values, [1, 2, 64, 4], [512, 256, 4, 1]).unwrap();
    assert_eq!(
        text(video_tiles(right, thin, &canvas, &similar)),
        "k has shape [1, 2, 4, 4], but q needs [1, 2, 4, 8]"
    );
    let spread = Tensor::strided(&values, [1, 1, 64, 8], [0, 0, 16, 2]).unwrap();
    assert_eq!(
        text(video_tiles(spread, right, &canvas, &similar)),
        "the last dimension of x must be contiguous, but its stride is 2"
    );
    let video = Video {
        thw: [2, 4, 8],
        tile: TILE,
        text_len: 0,
        padding: Padding::Zero,
    };
    assert_eq!(
        text(tiles_in_place(right, short, &video, &similar)),
        "k must be of all tokens of the video, got 63 tokens"
    );
    let cells = Some([[2, 4, 2], [1, 1, 1]]);
    let other = Choice { cells, ..similar };
    assert_eq!(
        text(tiles_in_place(right, right, &video, &other)),
        "cells must be of the video's tile, got [2, 4, 2]"
    );
    let pooled = Pooled::blocks(right, 16, None).unwrap();
    let scores = Scores::similarity(&pooled, &pooled).unwrap();
    let mut other = BlockMask::empty(Extents::new(64, 64, 16, 16).unwrap(), 1, 1);
    assert!(scores.keep_top(1, &mut other).is_err());
}
