//! Formulas as text, and back: `q >= kv and t0[q] == t0[kv]`.
//!
//! Python's words and precedence, but that `/` and `%` round down and tables are `t0`, `t1`, ... A step
//! that is used more than once has a name: `x0 = q / 16; x0 < 3 or x0 == kv / 16`. Text is what crosses
//! to other processes and into compiled graphs; equal formulas have equal text.

use std::fmt::{self, Display, Write};
use std::str::FromStr;

use super::{Formula, MOST_DIMENSIONS, Step, Steps};
use crate::MaskError;

/// How tightly things bind, loosest first.
mod binds {
    pub const OR: u8 = 1;
    pub const AND: u8 = 2;
    pub const NOT: u8 = 3;
    pub const COMPARED: u8 = 4;
    pub const ADDED: u8 = 5;
    pub const MULTIPLIED: u8 = 6;
    pub const NEGATED: u8 = 7;
    pub const ALONE: u8 = 8;
}

impl Display for Formula {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut uses = vec![0; self.steps.len()];
        for step in &self.steps {
            step.operands().into_iter().for_each(|i| uses[i] += 1);
        }
        // Each step's text, and how tightly it binds.
        let mut texts: Vec<(String, u8)> = Vec::new();
        let mut names = 0;
        for (i, step) in self.steps.iter().enumerate() {
            let (text, binding) = self.step(step, &texts)?;
            let is_short = step.operands().is_empty();
            texts.push(match uses[i] > 1 && !is_short {
                true => {
                    write!(f, "x{names} = {text}; ")?;
                    names += 1;
                    (format!("x{}", names - 1), binds::ALONE)
                }
                false => (text, binding),
            });
        }
        f.write_str(texts.last().map_or("", |(text, _)| text))
    }
}

impl Formula {
    fn step(&self, step: &Step, texts: &[(String, u8)]) -> Result<(String, u8), fmt::Error> {
        // An operand, in parentheses if it binds less tightly than is asked for.
        let of = |i: usize, binding: u8| match &texts[i] {
            (text, own) if *own >= binding => text.clone(),
            (text, _) => format!("({text})"),
        };
        let between = |a, word: &str, b, binding: u8| {
            let text = format!("{} {word} {}", of(a, binding), of(b, binding + 1));
            (text, binding)
        };
        // A number alone is read best on the right.
        let compared = |a: usize, [word, turned]: [&str; 2], b: usize| {
            let is_turned = matches!(self.steps[a], Step::Number(_)) && word != turned;
            let (a, b) = (of(a, binds::ADDED), of(b, binds::ADDED));
            let text = match is_turned {
                true => format!("{b} {turned} {a}"),
                false => format!("{a} {word} {b}"),
            };
            (text, binds::COMPARED)
        };
        let called = |name: &str, operands: &[usize]| {
            let operands: Vec<String> = operands.iter().map(|&i| of(i, binds::OR)).collect();
            (format!("{name}({})", operands.join(", ")), binds::ALONE)
        };
        let alone = |text: &str| (text.to_owned(), binds::ALONE);
        Ok(match *step {
            Step::Batch => alone("b"),
            Step::Head => alone("h"),
            Step::Query => alone("q"),
            Step::Key => alone("kv"),
            Step::Number(n) if n < 0 => (n.to_string(), binds::NEGATED),
            Step::Number(n) => alone(&n.to_string()),
            Step::Truth(truth) => alone(if truth { "true" } else { "false" }),
            Step::Add(a, b) => between(a, "+", b, binds::ADDED),
            Step::Subtract(a, b) if self.steps[a] == Step::Number(0) => {
                (format!("-{}", of(b, binds::ALONE)), binds::NEGATED)
            }
            Step::Subtract(a, b) => between(a, "-", b, binds::ADDED),
            Step::Multiply(a, b) => between(a, "*", b, binds::MULTIPLIED),
            Step::Divide(a, b) => between(a, "/", b, binds::MULTIPLIED),
            Step::Remainder(a, b) => between(a, "%", b, binds::MULTIPLIED),
            Step::Min(a, b) => called("min", &[a, b]),
            Step::Max(a, b) => called("max", &[a, b]),
            Step::Choose { condition, a, b } => called("where", &[condition, a, b]),
            Step::Table { table, ref indices } => {
                let mut text = format!("t{table}[");
                for (i, &index) in indices.iter().enumerate() {
                    let comma = if i > 0 { ", " } else { "" };
                    write!(text, "{comma}{}", of(index, binds::OR))?;
                }
                text.push(']');
                (text, binds::ALONE)
            }
            Step::Less(a, b) => compared(a, ["<", ">"], b),
            Step::Equal(a, b) => compared(a, ["==", "=="], b),
            Step::And(a, b) => between(a, "and", b, binds::AND),
            Step::Or(a, b) => between(a, "or", b, binds::OR),
            Step::Not(a) => match self.steps[a] {
                // A name is not taken apart.
                Step::Less(x, y) if texts[a].1 == binds::COMPARED => compared(x, [">=", "<="], y),
                Step::Equal(x, y) if texts[a].1 == binds::COMPARED => compared(x, ["!=", "!="], y),
                _ => (format!("not {}", of(a, binds::NOT)), binds::NOT),
            },
        })
    }
}

impl FromStr for Formula {
    type Err = MaskError;

    fn from_str(text: &str) -> Result<Self, MaskError> {
        let mut reader = Reader {
            text,
            at: 0,
            steps: Steps::new(),
            names: Vec::new(),
            tables: Vec::new(),
        };
        let formula = reader.formula();
        formula.map_err(|reason| MaskError::Formula {
            text: text.to_owned(),
            reason,
        })
    }
}

type Read<T> = Result<T, String>;

struct Reader<'a> {
    text: &'a str,
    at: usize,
    steps: Steps,
    /// Places of `x0`, `x1`, ...
    names: Vec<usize>,
    /// Dimensions of tables, as far as they have been seen.
    tables: Vec<Option<usize>>,
}

impl<'a> Reader<'a> {
    fn formula(&mut self) -> Read<Formula> {
        loop {
            let start = self.at;
            let is_name = self.word() == Some(&format!("x{}", self.names.len())[..]);
            if !(is_name && self.takes("=")) {
                self.at = start;
                break;
            }
            let place = self.any()?;
            self.names.push(place);
            self.needs(";")?;
        }
        let root = self.truth(Self::either)?;
        self.space();
        if self.at < self.text.len() {
            return Err(self.wrong("the end"));
        }
        let (mut formula, used) = self.steps.finish(root);
        // Tables keep the numbers that the text gives them.
        let dimensions = self.tables.iter().map(|dimensions| dimensions.unwrap_or(1));
        formula.tables = dimensions.collect();
        for step in &mut formula.steps {
            if let Step::Table { table, .. } = step {
                *table = used[*table];
            }
        }
        Ok(formula)
    }

    fn wrong(&self, wanted: &str) -> String {
        format!("{wanted} was expected at character {}", self.at)
    }

    fn space(&mut self) {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
    }

    /// Takes a sign, if it comes next; `=` is no part of `==`.
    fn takes(&mut self, sign: &str) -> bool {
        self.space();
        let rest = &self.text[self.at..];
        let found = rest.starts_with(sign) && !(sign == "=" && rest.starts_with("=="));
        self.at += if found { sign.len() } else { 0 };
        found
    }

    fn needs(&mut self, sign: &str) -> Read<()> {
        match self.takes(sign) {
            true => Ok(()),
            false => Err(self.wrong(sign)),
        }
    }

    /// Takes a word or a number, if one comes next.
    fn word(&mut self) -> Option<&'a str> {
        self.space();
        let rest = &self.text[self.at..];
        let end = rest
            .find(|c: char| !c.is_ascii_alphanumeric())
            .unwrap_or(rest.len());
        self.at += end;
        (end > 0).then_some(&rest[..end])
    }

    fn takes_word(&mut self, word: &str) -> bool {
        let start = self.at;
        let found = self.word() == Some(word);
        self.at = if found { self.at } else { start };
        found
    }

    fn typed(&mut self, is_truth: bool, read: fn(&mut Self) -> Read<usize>) -> Read<usize> {
        self.space();
        let start = self.at;
        let place = read(self)?;
        if self.steps.get(place).is_truth() == is_truth {
            return Ok(place);
        }
        self.at = start;
        Err(self.wrong(if is_truth { "a condition" } else { "a number" }))
    }

    fn truth(&mut self, read: fn(&mut Self) -> Read<usize>) -> Read<usize> {
        self.typed(true, read)
    }

    fn number(&mut self, read: fn(&mut Self) -> Read<usize>) -> Read<usize> {
        self.typed(false, read)
    }

    fn is_truth(&self, place: usize) -> bool {
        self.steps.get(place).is_truth()
    }

    fn any(&mut self) -> Read<usize> {
        self.either()
    }

    fn either(&mut self) -> Read<usize> {
        let mut a = self.both()?;
        while self.is_truth(a) && self.takes_word("or") {
            let b = self.truth(Self::both)?;
            a = self.steps.put(Step::Or(a, b));
        }
        Ok(a)
    }

    fn both(&mut self) -> Read<usize> {
        let mut a = self.negation()?;
        while self.is_truth(a) && self.takes_word("and") {
            let b = self.truth(Self::negation)?;
            a = self.steps.put(Step::And(a, b));
        }
        Ok(a)
    }

    fn negation(&mut self) -> Read<usize> {
        if self.takes_word("not") {
            let a = self.truth(Self::negation)?;
            return Ok(self.steps.put(Step::Not(a)));
        }
        let a = self.sum()?;
        if self.is_truth(a) {
            return Ok(a);
        }
        let signs = ["<=", ">=", "==", "!=", "<", ">"];
        let Some(sign) = signs.into_iter().find(|sign| self.takes(sign)) else {
            return Ok(a);
        };
        let b = self.number(Self::sum)?;
        let (step, is_negated) = match sign {
            "<" => (Step::Less(a, b), false),
            ">" => (Step::Less(b, a), false),
            "<=" => (Step::Less(b, a), true),
            ">=" => (Step::Less(a, b), true),
            "==" => (Step::Equal(a, b), false),
            _ => (Step::Equal(a, b), true),
        };
        let place = self.steps.put(step);
        Ok(match is_negated {
            true => self.steps.put(Step::Not(place)),
            false => place,
        })
    }

    fn sum(&mut self) -> Read<usize> {
        let mut a = self.product()?;
        while !self.is_truth(a) {
            let step: fn(usize, usize) -> Step = match () {
                () if self.takes("+") => Step::Add,
                () if self.takes("-") => Step::Subtract,
                () => break,
            };
            let b = self.number(Self::product)?;
            a = self.steps.put(step(a, b));
        }
        Ok(a)
    }

    fn product(&mut self) -> Read<usize> {
        let mut a = self.sign()?;
        while !self.is_truth(a) {
            let step: fn(usize, usize) -> Step = match () {
                () if self.takes("*") => Step::Multiply,
                () if self.takes("//") || self.takes("/") => Step::Divide,
                () if self.takes("%") => Step::Remainder,
                () => break,
            };
            let b = self.number(Self::sign)?;
            a = self.steps.put(step(a, b));
        }
        Ok(a)
    }

    fn sign(&mut self) -> Read<usize> {
        if !self.takes("-") {
            return self.alone();
        }
        let start = self.at;
        if let Some(Ok(n)) = self.word().map(str::parse::<i64>) {
            let n = i32::try_from(-n).map_err(|_| format!("-{n} is no int32 number"))?;
            return Ok(self.steps.number(n));
        }
        self.at = start;
        let a = self.number(Self::sign)?;
        let zero = self.steps.number(0);
        Ok(self.steps.put(Step::Subtract(zero, a)))
    }

    fn alone(&mut self) -> Read<usize> {
        if self.takes("(") {
            let a = self.either()?;
            self.needs(")")?;
            return Ok(a);
        }
        let start = self.at;
        let word = self.word().unwrap_or("");
        let numbered = |letter: &str| {
            let digits = word.strip_prefix(letter)?;
            digits.parse::<usize>().ok()
        };
        match word {
            "b" => Ok(self.steps.put(Step::Batch)),
            "h" => Ok(self.steps.put(Step::Head)),
            "q" => Ok(self.steps.put(Step::Query)),
            "kv" => Ok(self.steps.put(Step::Key)),
            "true" => Ok(self.steps.truth(true)),
            "false" => Ok(self.steps.truth(false)),
            "min" => self.called(Step::Min),
            "max" => self.called(Step::Max),
            "where" => {
                self.needs("(")?;
                let condition = self.truth(Self::either)?;
                self.needs(",")?;
                let a = self.number(Self::sum)?;
                self.needs(",")?;
                let b = self.number(Self::sum)?;
                self.needs(")")?;
                Ok(self.steps.put(Step::Choose { condition, a, b }))
            }
            _ => match (word.parse::<i32>(), numbered("x"), numbered("t")) {
                (Ok(n), _, _) => Ok(self.steps.number(n)),
                (_, Some(name), _) if name < self.names.len() => Ok(self.names[name]),
                (_, _, Some(table)) if table < 1024 => self.lookup(table),
                _ => {
                    self.at = start;
                    Err(self.wrong("a number, a name or a table"))
                }
            },
        }
    }

    fn called(&mut self, step: fn(usize, usize) -> Step) -> Read<usize> {
        self.needs("(")?;
        let a = self.number(Self::sum)?;
        self.needs(",")?;
        let b = self.number(Self::sum)?;
        self.needs(")")?;
        Ok(self.steps.put(step(a, b)))
    }

    fn lookup(&mut self, table: usize) -> Read<usize> {
        self.needs("[")?;
        let mut indices = vec![self.number(Self::sum)?];
        while self.takes(",") {
            indices.push(self.number(Self::sum)?);
        }
        self.needs("]")?;
        if self.tables.len() <= table {
            self.tables.resize(table + 1, None);
        }
        let known = *self.tables[table].get_or_insert(indices.len());
        if known != indices.len() || known > MOST_DIMENSIONS {
            return Err(format!(
                "table t{table} is looked up by other numbers of indices"
            ));
        }
        Ok(self.steps.put(Step::Table { table, indices }))
    }
}
