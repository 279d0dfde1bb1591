//! Expressions against brute force: every pair evaluated one by one, in 64-bit numbers, by an
//! interpreter that shares nothing with the library's.

use flex_block_attn_mask::expression::{
    Evaluator, Expression, Formula, Number, Step, Steps, Table, Truth, b, h, kv, q,
};
use flex_block_attn_mask::{BlockMask, BoolMatrix, Extents, MaskError, Plan, PlanView, Side};
use flex_block_attn_mask::{block_of, is_partial};
use proptest::prelude::*;

/// Whether a pair counts.
fn counts(expression: &Expression, batch: usize, head: usize, query: usize, key: usize) -> bool {
    let mut values: Vec<i64> = Vec::new();
    for step in &expression.formula().steps {
        let of = |i: usize| values[i];
        values.push(match *step {
            Step::Batch => batch as i64,
            Step::Head => head as i64,
            Step::Query => query as i64,
            Step::Key => key as i64,
            Step::Number(n) => n.into(),
            Step::Truth(truth) => truth.into(),
            Step::Add(a, b) => of(a) + of(b),
            Step::Subtract(a, b) => of(a) - of(b),
            Step::Multiply(a, b) => of(a) * of(b),
            Step::Divide(a, b) => (of(a) as f64 / of(b) as f64).floor() as i64,
            Step::Remainder(a, b) => of(a) - of(b) * (of(a) as f64 / of(b) as f64).floor() as i64,
            Step::Min(a, b) => of(a).min(of(b)),
            Step::Max(a, b) => of(a).max(of(b)),
            Step::Choose { condition, a, b } => of(if of(condition) != 0 { a } else { b }),
            Step::Table { table, ref indices } => {
                let table = &expression.tables()[table];
                let at = indices
                    .iter()
                    .zip(table.extents())
                    .fold(0, |at, (&i, &extent)| at * i64::from(extent) + of(i));
                table.values().unwrap()[at as usize].into()
            }
            Step::Less(a, b) => (of(a) < of(b)).into(),
            Step::Equal(a, b) => (of(a) == of(b)).into(),
            Step::And(a, b) => of(a) & of(b),
            Step::Or(a, b) => of(a) | of(b),
            Step::Not(a) => 1 - of(a),
        });
    }
    values[values.len() - 1] != 0
}

/// Blocks, their kind and the plan's entries are what all pairs say.
fn check(extents: Extents, batch: usize, heads: usize, expression: &Expression) {
    let mask = BlockMask::from_expression(extents, batch, heads, expression).unwrap();
    let formula = expression.formula();
    assert_eq!(
        mask.batch(),
        if formula.depends_on_batch() { batch } else { 1 }
    );
    assert_eq!(
        mask.heads(),
        if formula.depends_on_head() { heads } else { 1 }
    );
    let plan = Plan::new(&mask);
    let view = PlanView::with_expression(plan.layout(), plan.words(), expression).unwrap();
    let mut evaluator = Evaluator::new(expression).unwrap();
    for b in 0..mask.batch() {
        for h in 0..mask.heads() {
            for row in 0..extents.q_blocks() {
                for column in 0..extents.kv_blocks() {
                    let keys = extents.kv_tokens(column);
                    let (mut any, mut all) = (false, true);
                    for part in keys.clone().step_by(Evaluator::MOST_KEYS) {
                        let part = part..(part + Evaluator::MOST_KEYS).min(keys.end);
                        evaluator.tile(b, h, part.clone());
                        for query in extents.q_tokens(row) {
                            let found = evaluator.row(query);
                            for (key, &found) in part.clone().zip(found) {
                                let counts = counts(expression, b, h, query, key);
                                assert_eq!(
                                    found,
                                    -i32::from(counts),
                                    "{expression} at {query}, {key}"
                                );
                                any |= counts;
                                all &= counts;
                            }
                        }
                    }
                    let found = (
                        mask.contains(b, h, row, column),
                        mask.is_partial(b, h, row, column),
                    );
                    assert_eq!(
                        found,
                        (any, any && !all),
                        "{expression} in block {row}, {column}"
                    );
                    let entry = |list: &[i32], block: usize| {
                        let found = list.iter().find(|&&entry| block_of(entry) == block);
                        found.map(|&entry| is_partial(entry))
                    };
                    let kind = any.then_some(!all);
                    assert_eq!(entry(view.row(b, h, row), column), kind);
                    assert_eq!(entry(view.column(b, h, column), row), kind);
                }
            }
        }
    }
}

/// Numbers of tables by chance.
fn numbers(seed: u64, len: usize, below: u64) -> Vec<i32> {
    let mut state = seed;
    let next = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % below) as i32
    };
    (0..len).map(next).collect()
}

const BATCH: usize = 2;
const HEADS: usize = 3;
/// Tokens at most.
const TOKENS: usize = 400;

/// Numbers whose size stays small, `depth` operations deep.
fn number() -> impl Strategy<Value = Number> {
    let token = || prop_oneof![Just(q()), Just(kv())];
    let leaf = prop_oneof![
        3 => token(),
        1 => (-40i32..40).prop_map(Number::from),
        1 => Just(h()),
        1 => Just(b()),
        1 => (token(), 1u64..20, any::<u64>(), any::<bool>()).prop_map(|(at, below, seed, sorted)| {
            let mut values = numbers(seed, TOKENS, below);
            if sorted {
                values.sort_unstable();
            }
            Table::new(&[TOKENS as u32], values).unwrap().at([at])
        }),
        1 => (token(), any::<u64>()).prop_map(|(at, seed)| {
            let extents = [BATCH as u32, HEADS as u32, TOKENS as u32];
            let values = numbers(seed, BATCH * HEADS * TOKENS, 400);
            Table::new(&extents, values).unwrap().at([b(), h(), at])
        }),
    ];
    leaf.prop_recursive(3, 12, 2, |inner| {
        let pair = || (inner.clone(), inner.clone());
        prop_oneof![
            pair().prop_map(|(a, b)| a + b),
            pair().prop_map(|(a, b)| a - b),
            (inner.clone(), -3i32..4).prop_map(|(a, n)| a * n),
            (inner.clone(), 1i32..90).prop_map(|(a, n)| a / n),
            (inner.clone(), 1i32..90).prop_map(|(a, n)| a % n),
            (inner.clone(), -20i32..-1).prop_map(|(a, n)| a.clone() % n + a / n),
            pair().prop_map(|(a, b)| a.min(b)),
            pair().prop_map(|(a, b)| a.max(b)),
            inner.clone().prop_map(|a| -a),
            inner.clone().prop_map(Number::abs),
            (pair(), pair()).prop_map(|((a, b), (c, d))| a.less_than(b).choose(c, d)),
        ]
    })
}

fn condition() -> impl Strategy<Value = Truth> {
    let leaf = (number(), number(), -30i32..30).prop_flat_map(|(a, b, n)| {
        prop_oneof![
            Just(a.clone().less_than(b.clone() + n)),
            Just(a.clone().at_least(b.clone())),
            Just(a.clone().equals(b)),
            Just(a.abs().at_most(n.abs())),
        ]
    });
    leaf.prop_recursive(2, 5, 2, |inner| {
        let pair = || (inner.clone(), inner.clone());
        prop_oneof![
            pair().prop_map(|(a, b)| a & b),
            pair().prop_map(|(a, b)| a | b),
            pair().prop_map(|(a, b)| a ^ b),
            inner.clone().prop_map(|a| !a),
        ]
    })
}

/// A condition on what both tokens are in some order: on a canvas, in a document, in all.
fn alike() -> impl Strategy<Value = Truth> {
    let places = (
        0usize..6,
        prop::sample::select(vec![2, 3, 8, 16, 20, 32, 48, 96]),
        1i32..9,
    );
    let near = (places, -1i32..40, 0usize..3).prop_map(|((kind, n, m), reach, how)| {
        let of = |token: Number| match kind {
            0 => token,
            1 => token / n,
            2 => token % n,
            3 => token % n / m,
            4 => (token.clone() / n).max(m) + token % m,
            _ => {
                let values = (0..TOKENS as i32).map(|token| token / n * m);
                Table::new(&[TOKENS as u32], values.collect())
                    .unwrap()
                    .at([token])
            }
        };
        let (query, key) = (of(q()), of(kv()));
        match how {
            0 => (query - key).abs().at_most(reach),
            1 => key.at_most(query + reach / 8),
            _ => query.equals(key + reach / 20),
        }
    });
    near.prop_recursive(2, 4, 2, |inner| {
        let pair = || (inner.clone(), inner.clone());
        prop_oneof![
            4 => pair().prop_map(|(a, b)| a & b),
            2 => pair().prop_map(|(a, b)| a | b),
            1 => inner.clone().prop_map(|a| !a),
        ]
    })
}

fn extents() -> impl Strategy<Value = Extents> {
    (1usize..5, 1usize..9, 1usize..150, 1usize..TOKENS)
        .prop_map(|(q, kv, q_len, kv_len)| Extents::new(q_len, kv_len, q * 16, kv * 16).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]

    #[test]
    fn blocks_are_what_all_pairs_say(extents in extents(), condition in condition()) {
        let expression = Expression::new(&condition).unwrap();
        check(extents, BATCH, HEADS, &expression);
    }

    #[test]
    fn blocks_that_repeat(extents in extents(), condition in alike()) {
        check(extents, 1, 1, &Expression::new(&condition).unwrap());
    }

    #[test]
    fn text_and_back(condition in condition()) {
        let expression = Expression::new(&condition).unwrap();
        let text = expression.to_string();
        let again: Formula = text.parse().unwrap_or_else(|error| panic!("{error}"));
        prop_assert_eq!(again.to_string(), text);
        prop_assert_eq!(&again, expression.formula());
    }
}

fn expression(condition: &Truth) -> Expression {
    Expression::new(condition).unwrap()
}

fn square(tokens: usize, block: usize) -> Extents {
    Extents::new(tokens, tokens, block, block).unwrap()
}

/// A window of tokens of a (time, height, width) canvas.
fn window([height, width]: [i32; 2], reach: [i32; 3]) -> Truth {
    let places = |token: Number| {
        let plane = height * width;
        [
            token.clone() / plane,
            token.clone() % plane / width,
            token % width,
        ]
    };
    let pairs = places(q()).into_iter().zip(places(kv())).zip(reach);
    let near = pairs.map(|((a, b), reach)| (a - b).abs().at_most(reach));
    near.reduce(|a, b| a & b).unwrap()
}

#[test]
fn masks_as_users_have_them() {
    let causal = || kv().at_most(q());
    let document = |tokens: usize, values: Vec<i32>| {
        let table = Table::new(&[tokens as u32], values).unwrap();
        table.at([q()]).equals(table.at([kv()]))
    };
    let sorted = |tokens: usize| {
        (0..tokens as i32)
            .map(|token| token / 37)
            .collect::<Vec<_>>()
    };
    let shuffled = |tokens: usize| {
        sorted(tokens)
            .into_iter()
            .map(|d| d * 7 % 11)
            .collect::<Vec<_>>()
    };
    for tokens in [300, 517] {
        for block in [16, 48, 128] {
            let extents = square(tokens, block);
            let all = [
                causal(),
                causal() & (q() - kv()).less_than(70),
                causal() | kv().less_than(40),
                (q() / 50).equals(kv() / 50),
                causal() & (q() - kv()).equals((q() - kv()) / 3 * 3),
                document(tokens, sorted(tokens)),
                document(tokens, shuffled(tokens)) & causal(),
                window([6, 11], [1, 2, 3]),
                (q() - kv()).abs().less_than(h() * 30 + 5),
                kv().less_than(Table::new(&[2], vec![100, 200]).unwrap().at([b()])),
                Truth::from(true),
                Truth::from(false),
                q().less_than(tokens as i32),
            ];
            for condition in all {
                check(extents, BATCH, HEADS, &expression(&condition));
            }
        }
    }
}

/// So many blocks that several threads share the work, a mask for each head.
#[test]
fn large_masks() {
    let tokens = 10_000;
    let extents = square(tokens, 16);
    let near = kv().at_most(q()) & (q() - kv()).less_than(h() * 64 + 100);
    let mask = BlockMask::from_expression(extents, 1, 2, &expression(&near)).unwrap();
    let plan = Plan::new(&mask);
    let rows = extents.q_blocks();
    assert!(2 * rows * rows > 1 << 19);
    for head in 0..2 {
        let width = 64 * head + 100;
        // Distances in a block: from those of its corners.
        let kind = |row: usize, column: usize| {
            let low = 16 * row as i64 - (16 * column as i64 + 15);
            let high = low + 30;
            let (wanted, whole) = (0..width as i64, low >= 0 && high < width as i64);
            let some = high >= wanted.start && low < wanted.end;
            (some, some && !whole)
        };
        for row in 0..rows {
            let found = plan.view().row(0, head, row);
            let expected = (0..rows).filter(|&column| kind(row, column).0);
            let expected: Vec<_> = expected
                .map(|column| (column, kind(row, column).1))
                .collect();
            let found = found
                .iter()
                .map(|&entry| (block_of(entry), is_partial(entry)));
            assert_eq!(found.collect::<Vec<_>>(), expected);
            let found = plan.view().column(0, head, row);
            let expected = (0..rows).filter(|&other| kind(other, row).0);
            let expected: Vec<_> = expected.map(|other| (other, kind(other, row).1)).collect();
            let found = found
                .iter()
                .map(|&entry| (block_of(entry), is_partial(entry)));
            assert_eq!(found.collect::<Vec<_>>(), expected);
        }
    }
}

#[test]
fn nothing_to_attend_to() {
    for (q_len, kv_len) in [(0, 100), (100, 0), (0, 0)] {
        let extents = Extents::new(q_len, kv_len, 16, 16).unwrap();
        let table = Table::new(&[0], vec![]).unwrap();
        let looked_up = expression(&table.at([q()]).equals(1));
        let mask = BlockMask::from_expression(extents, 2, 2, &looked_up).unwrap();
        assert_eq!(mask.count(), 0);
    }
}

#[test]
fn numbers_that_only_a_device_has_leave_blocks_partial() {
    let table = Table::elsewhere(&[64]).unwrap();
    let same = table.at([q()]).equals(table.at([kv()]));
    let condition = expression(&(same & kv().at_most(q())));
    assert_eq!(condition.tables().len(), 1);
    let mask = BlockMask::from_expression(square(64, 16), 1, 1, &condition).unwrap();
    assert_eq!((mask.count(), mask.count_partial()), (10, 10));
    assert!(Evaluator::new(&condition).is_none());
}

#[test]
fn formulas_are_short_and_read_well() {
    let text = |condition: Truth| expression(&condition).to_string();
    assert_eq!(
        text(kv().at_most(q()) & (q() - kv()).less_than(64)),
        "q >= kv and q - kv < 64"
    );
    assert_eq!(
        text((q() / 16).equals(kv() / 16) | (q() / 16).less_than(3)),
        "x0 = q / 16; x0 == kv / 16 or x0 < 3"
    );
    assert_eq!(
        text(!(q().equals(kv()) | h().less_than(2))),
        "not (q == kv or h < 2)"
    );
    assert_eq!(text((-(q() - 3)).less_than(-2)), "-(q - 3) < -2");
    assert_eq!(
        text((q() - (kv() - 1)).equals(q() * 2 % 3)),
        "q - (kv - 1) == q * 2 % 3"
    );
    assert_eq!(
        text(q().less_than(kv()).choose(1, q()).more_than(q().min(kv()))),
        "min(q, kv) < where(q < kv, 1, q)"
    );
    assert_eq!(text(Truth::from(true) & q().equals(q())), "true");
    assert_eq!(text(!!(q() + 0).less_than(kv() * 1)), "q < kv");
    let same = Step::Less(0, 1);
    let mut steps = Steps::new();
    for step in [Step::Query, Step::Key, same.clone(), same] {
        steps.put(step);
    }
    assert_eq!(steps.len(), 3);
}

#[test]
fn text_that_is_no_formula_is_refused_where_it_ends_to_be_one() {
    for (text, reason) in [
        (
            "q <",
            "a number, a name or a table was expected at character 3",
        ),
        ("q + kv", "a condition was expected at character 0"),
        ("q < kv kv", "the end was expected at character 7"),
        ("not q", "a condition was expected at character 4"),
        (
            "t0[q] == t0[q, kv]",
            "table t0 is looked up by other numbers of indices",
        ),
        (
            "q < x0",
            "a number, a name or a table was expected at character 4",
        ),
        ("(q < kv) < 3", "the end was expected at character 9"),
        (
            "",
            "a number, a name or a table was expected at character 0",
        ),
    ] {
        let error = text.parse::<Formula>().unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("the mask's expression {text} cannot be used: {reason}")
        );
    }
    let spaced: Formula = " (q)>=kv  and not( q==3 ) ".parse().unwrap();
    assert_eq!(spaced.to_string(), "q >= kv and q != 3");
}

#[test]
fn what_leaves_its_range_is_refused() {
    let refusal = |condition: Truth| {
        let extents = square(100_000, 128);
        let mask = BlockMask::from_expression(extents, 2, 2, &expression(&condition));
        let error = mask.unwrap_err().to_string();
        error.split(" cannot be used: ").nth(1).unwrap().to_owned()
    };
    let table = Table::new(&[100_000], vec![0; 100_000]).unwrap();
    assert_eq!(
        refusal((q() * kv()).less_than(5)),
        "q * kv goes from 0 to 9999800001, which int32 does not hold"
    );
    assert_eq!(refusal((q() % kv()).less_than(5)), "q % kv may divide by 0");
    assert_eq!(
        refusal(table.at([q() + 1]).less_than(5)),
        "index q + 1 of table t0 goes from 1 to 100000, but that dimension has 100000 entries: \
         clamp it"
    );
    assert_eq!(
        refusal(table.at([q() - kv()]).less_than(5)),
        "index q - kv of table t0 goes from -99999 to 99999, but that dimension has 100000 \
         entries: clamp it"
    );
    let clamped = table.at([(q() + 1).min(99_999)]).less_than(5);
    BlockMask::from_expression(square(100_000, 128), 1, 1, &expression(&clamped)).unwrap();
}

#[test]
fn tables_have_the_values_that_they_say() {
    let text = |result: Result<Table, MaskError>| result.unwrap_err().to_string();
    assert_eq!(
        text(Table::new(&[2, 3], vec![0; 5])),
        "values must be as many as the table's extents say, got 5"
    );
    assert_eq!(
        text(Table::new(&[1; 5], vec![0])),
        "a table's number of dimensions must be 1 to 4, got 5"
    );
    assert_eq!(
        text(Table::elsewhere(&[1 << 16, 1 << 16])),
        "a table's number of values must be less than 2^31, got [65536, 65536]"
    );
    let formula: Formula = "t0[q] == t1[b, kv]".parse().unwrap();
    let table = Table::new(&[4], vec![0; 4]).unwrap();
    let error = Expression::from_formula(formula, vec![table]).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("its tables have [1, 2] dimensions, but those given [1]")
    );
}

#[test]
fn blocks_that_somebody_else_chose() {
    let extents = square(64, 16);
    let wanted = [1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1];
    let partial = [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0];
    let matrix = |bytes| BoolMatrix::dense(bytes, 4, 4).unwrap();
    let causal = expression(&kv().at_most(q()));
    let mask =
        BlockMask::from_matrices(extents, matrix(&wanted), matrix(&partial), causal).unwrap();
    assert_eq!(mask.to_dense(), wanted);
    // A block that is not wanted is not partial.
    assert_eq!(
        mask.partial_to_dense(),
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    );
    assert!(mask.union(&mask).is_err());
}

#[test]
fn plans_with_partial_blocks_need_an_expression() {
    let causal = expression(&kv().at_most(q()));
    let mask = BlockMask::from_expression(square(32, 16), 1, 1, &causal).unwrap();
    let plan = Plan::new(&mask);
    let side = plan.layout().side(Side::Rows);
    assert_eq!(plan.words()[side.list(1)..][..2], [0, 1 | i32::MIN]);
    let error = PlanView::new(plan.layout(), plan.words()).unwrap_err();
    assert!(
        error.to_string().contains("a list is not ascending"),
        "{error}"
    );
    let mut words = vec![7; plan.words().len()];
    Plan::write(&mask, &mut words).unwrap();
    assert_eq!(words, plan.words());
    assert!(Plan::write(&mask, &mut words[1..]).is_err());
}

#[test]
fn masks_that_threads_share() {
    // 70 x 70 blocks, of three heads: far more than one piece of work.
    let tokens = 1115;
    let width = Table::new(&[3], vec![40, 300, 2000]).unwrap();
    let apart = q() - kv();
    let window = apart.clone().abs().less_than(width.at([h()]));
    let condition = expression(&(window & (apart % 3).equals(0)));
    let mask = BlockMask::from_expression(square(tokens, 16), 2, 3, &condition).unwrap();
    assert_eq!((mask.batch(), mask.heads()), (1, 3));
    let rows = tokens.div_ceil(16);
    for (head, width) in [40, 300, 2000].into_iter().enumerate() {
        for (row, column) in (0..rows * rows).map(|at| (at / rows, at % rows)) {
            let range = |block: usize| block * 16..(block * 16 + 16).min(tokens);
            let counts = |query: usize, key: usize| {
                query.abs_diff(key) < width && query.abs_diff(key).is_multiple_of(3)
            };
            let some = range(row).any(|query| range(column).any(|key| counts(query, key)));
            assert_eq!(mask.contains(0, head, row, column), some);
            // Of two neighbours one is no multiple of 3 away.
            assert_eq!(mask.is_partial(0, head, row, column), some);
        }
    }
}
