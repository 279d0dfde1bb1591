//! The operands of an instruction as PTX text: what follows the mnemonic.
//!
//! In: an [`Op`] and the [`Names`] of its kernel's registers and parameters. Called by the printer.

use crate::ir::{Address, Kernel, MatrixA, Op, Operand, RegId, ShuffleMode, Special};
use crate::{Class, Ty};

/// How a kernel's registers and parameters are written.
pub(super) struct Names<'k> {
    kernel: &'k Kernel,
    /// Each register's number within its class.
    numbers: Vec<u32>,
    /// Registers of each class, in the order of [`CLASSES`].
    pub(super) counts: [u32; CLASSES.len()],
}

/// Each class, with the letter its registers start with.
pub(super) const CLASSES: [(Class, &str); 5] = [
    (Class::Pred, "p"),
    (Class::B16, "h"),
    (Class::B32, "r"),
    (Class::B64, "d"),
    (Class::F32, "f"),
];

fn index(class: Class) -> usize {
    match class {
        Class::Pred => 0,
        Class::B16 => 1,
        Class::B32 => 2,
        Class::B64 => 3,
        Class::F32 => 4,
    }
}

impl<'k> Names<'k> {
    pub(super) fn new(kernel: &'k Kernel) -> Self {
        let mut counts = [0; CLASSES.len()];
        let numbers = kernel.registers.iter().map(|&class| {
            let count = &mut counts[index(class)];
            *count += 1;
            *count - 1
        });
        let numbers = numbers.collect();
        Self {
            kernel,
            numbers,
            counts,
        }
    }

    /// A register that the kernel does not have, which only a wrong kernel names, is `%?7`.
    pub(super) fn register(&self, RegId(id): RegId) -> String {
        match self.kernel.registers.get(id as usize) {
            Some(&class) => {
                format!("%{}{}", CLASSES[index(class)].1, self.numbers[id as usize])
            }
            None => format!("%?{id}"),
        }
    }

    /// Parameters carry a prefix: PTX refuses names such as `max`, which are instructions.
    pub(super) fn param(&self, index: u32) -> String {
        match self.kernel.params.get(index as usize) {
            Some(param) => format!("arg_{}", param.name),
            None => format!("arg?{index}"),
        }
    }

    fn operand(&self, ty: Ty, operand: Operand) -> String {
        match operand {
            Operand::Reg(register) => self.register(register),
            Operand::Imm(bits) => constant(ty, bits),
        }
    }

    fn address(&self, Address { base, offset }: Address) -> String {
        let base = self.register(base);
        match offset {
            0 => format!("[{base}]"),
            // PTX knows no minus here: a negative constant is added.
            _ => format!("[{base}+{offset}]"),
        }
    }

    fn registers(&self, registers: &[RegId]) -> String {
        let names: Vec<_> = registers
            .iter()
            .map(|&register| self.register(register))
            .collect();
        format!("{{{}}}", names.join(", "))
    }

    /// One operand as it is, several in braces.
    fn vector(&self, ty: Ty, operands: &[Operand]) -> String {
        match operands {
            [one] => self.operand(ty, *one),
            _ => {
                let texts: Vec<_> = operands.iter().map(|&x| self.operand(ty, x)).collect();
                format!("{{{}}}", texts.join(", "))
            }
        }
    }

    fn destinations(&self, registers: &[RegId]) -> String {
        match registers {
            [one] => self.register(*one),
            _ => self.registers(registers),
        }
    }

    /// A tensor map and a place in the tensor.
    fn tensor(&self, map: RegId, coordinates: &[Operand]) -> String {
        let texts: Vec<_> = coordinates
            .iter()
            .map(|&x| self.operand(Ty::S32, x))
            .collect();
        format!("[{}, {{{}}}]", self.register(map), texts.join(", "))
    }
}

/// A constant of type `ty`: floats by their bits, signed numbers with their sign, large bit
/// patterns in hexadecimal.
fn constant(ty: Ty, bits: u64) -> String {
    match ty {
        Ty::F32 => format!("0f{:08X}", bits as u32),
        Ty::S16 => (bits as u16 as i16).to_string(),
        Ty::S32 => (bits as u32 as i32).to_string(),
        Ty::S64 => (bits as i64).to_string(),
        Ty::B8 | Ty::B16 | Ty::B32 | Ty::B64 | Ty::Bf16x2 | Ty::F16x2 | Ty::F16 if bits > 999 => {
            format!("{bits:#x}")
        }
        _ => bits.to_string(),
    }
}

fn special(which: Special) -> &'static str {
    match which {
        Special::TidX => "%tid.x",
        Special::CtaIdX => "%ctaid.x",
        Special::CtaIdY => "%ctaid.y",
        Special::CtaIdZ => "%ctaid.z",
        Special::GridX => "%nctaid.x",
        Special::GridY => "%nctaid.y",
        Special::GridZ => "%nctaid.z",
        Special::LaneId => "%laneid",
        Special::ClusterCtaRank => "%cluster_ctarank",
        Special::SmId => "%smid",
        Special::Clock => "%clock",
    }
}

/// Lanes of a shuffle beyond which none is read.
fn clamp(mode: ShuffleMode) -> &'static str {
    match mode {
        ShuffleMode::Up => "0",
        ShuffleMode::Index | ShuffleMode::Butterfly | ShuffleMode::Down => "31",
    }
}

/// The operands of `op`, in PTX's order.
pub(super) fn arguments(op: &Op, names: &Names<'_>) -> Vec<String> {
    let reg = |register: RegId| names.register(register);
    let value = |ty: Ty, operand: Operand| names.operand(ty, operand);
    let at = |address: Address| names.address(address);
    match *op {
        Op::Mov { ty, dst, src } => vec![reg(dst), value(ty, src)],
        Op::Special { dst, which } => vec![reg(dst), special(which).into()],
        Op::Param { dst, param, .. } => vec![reg(dst), format!("[{}]", names.param(param))],
        Op::ParamAddress { dst, .. } => vec![reg(dst), reg(dst)],
        Op::SharedBase { dst } => vec![reg(dst), super::SHARED.into()],
        Op::Unary { ty, dst, a, .. } => vec![reg(dst), value(ty, a)],
        Op::Binary { op, ty, dst, a, b } => {
            use crate::ir::Binary::{Shl, Shr};
            let b_ty = if matches!(op, Shl | Shr) { Ty::U32 } else { ty };
            vec![reg(dst), value(ty, a), value(b_ty, b)]
        }
        Op::Ternary {
            ty, dst, a, b, c, ..
        } => {
            vec![reg(dst), value(ty, a), value(ty, b), value(ty, c)]
        }
        Op::MulWide { ty, dst, a, b, c } => {
            let c = c.map(|c| value(if ty == Ty::S32 { Ty::S64 } else { Ty::U64 }, c));
            [reg(dst), value(ty, a), value(ty, b)]
                .into_iter()
                .chain(c)
                .collect()
        }
        Op::Lop3 {
            dst,
            a,
            b,
            c,
            table,
        } => {
            let [a, b, c] = [a, b, c].map(|x| value(Ty::B32, x));
            vec![reg(dst), a, b, c, format!("0x{table:02x}")]
        }
        Op::Permute {
            dst,
            a,
            b,
            selector,
        } => {
            let [a, b, selector] = [a, b, selector].map(|x| value(Ty::B32, x));
            vec![reg(dst), a, b, selector]
        }
        Op::Convert { from, dst, src, .. } => vec![reg(dst), value(from, src)],
        Op::Pack { dst, low, high, .. } => {
            vec![reg(dst), value(Ty::F32, high), value(Ty::F32, low)]
        }
        Op::Join { dst, low, high, .. } => vec![reg(dst), names.vector(Ty::B32, &[low, high])],
        Op::Split { ty, low, high, src } => vec![names.registers(&[low, high]), value(ty, src)],
        Op::Compare { ty, dst, a, b, .. } => vec![reg(dst), value(ty, a), value(ty, b)],
        Op::Select {
            ty,
            dst,
            a,
            b,
            cond,
        } => {
            vec![reg(dst), value(ty, a), value(ty, b), reg(cond)]
        }

        Op::Load {
            ref dst, address, ..
        } => vec![names.destinations(dst), at(address)],
        Op::Store {
            ty,
            ref src,
            address,
            ..
        }
        | Op::Reduce {
            ty,
            ref src,
            address,
            ..
        } => {
            vec![at(address), names.vector(ty, src)]
        }
        Op::Atomic {
            ty,
            dst,
            address,
            src,
            swap,
            ..
        } => {
            let swap = swap.map(|swap| value(ty, swap));
            [reg(dst), at(address), value(ty, src)]
                .into_iter()
                .chain(swap)
                .collect()
        }
        Op::LoadAcquire { dst, address, .. } => vec![reg(dst), at(address)],
        Op::StoreRelease {
            ty, src, address, ..
        } => vec![at(address), value(ty, src)],
        Op::LoadMatrix {
            ref dst, address, ..
        } => vec![names.registers(dst), at(address)],
        Op::StoreMatrix {
            ref src, address, ..
        } => vec![at(address), names.registers(src)],

        Op::Shuffle {
            mode,
            dst,
            src,
            lane,
        } => {
            let (src, lane) = (value(Ty::B32, src), value(Ty::U32, lane));
            vec![reg(dst), src, lane, clamp(mode).into(), "-1".into()]
        }
        Op::Vote { dst, src, .. } | Op::Ballot { dst, src } => {
            vec![reg(dst), reg(src), "-1".into()]
        }
        Op::WarpReduce { ty, dst, src, .. } => vec![reg(dst), value(ty, src), "-1".into()],
        Op::Elect { dst } => vec![format!("_|{}", reg(dst)), "-1".into()],
        Op::WarpSync => vec!["-1".into()],
        Op::Mma { acc, a, b, .. } => {
            let sum = names.registers(&acc);
            vec![sum.clone(), names.registers(&a), names.registers(&b), sum]
        }

        Op::BarrierSync { id, threads } | Op::BarrierArrive { id, threads } => {
            vec![value(Ty::U32, id), value(Ty::U32, threads)]
        }
        Op::MapShared { dst, address, rank } => {
            vec![reg(dst), value(Ty::U32, address), value(Ty::U32, rank)]
        }
        Op::MbarrierInit { address, count } => vec![at(address), value(Ty::U32, count)],
        Op::MbarrierInvalidate { address } => vec![at(address)],
        Op::MbarrierArrive { address, .. } => vec!["_".into(), at(address)],
        Op::MbarrierArriveExpect { address, bytes } => {
            vec!["_".into(), at(address), value(Ty::U32, bytes)]
        }
        Op::MbarrierWait {
            address, parity, ..
        } => {
            vec![
                super::DONE.into(),
                at(address),
                value(Ty::U32, parity),
                super::PATIENCE.into(),
            ]
        }
        Op::MbarrierTest {
            dst,
            address,
            parity,
        } => {
            vec![reg(dst), at(address), value(Ty::U32, parity)]
        }

        Op::TmaLoad {
            dst,
            map,
            ref coordinates,
            barrier,
            multicast,
            hint,
        } => {
            let multicast = multicast.map(|mask| value(Ty::U16, mask));
            [at(dst), names.tensor(map, coordinates), at(barrier)]
                .into_iter()
                .chain(multicast)
                .chain(hint.map(reg))
                .collect()
        }
        Op::TmaStore {
            map,
            ref coordinates,
            src,
            hint,
        } => [names.tensor(map, coordinates), at(src)]
            .into_iter()
            .chain(hint.map(reg))
            .collect(),
        Op::TmaReduceAdd {
            map,
            ref coordinates,
            src,
        } => {
            vec![names.tensor(map, coordinates), at(src)]
        }
        Op::PrefetchMap { map } => vec![format!("[{}]", reg(map))],
        Op::BulkLoad {
            dst,
            src,
            bytes,
            barrier,
            hint,
        } => [at(dst), at(src), value(Ty::U32, bytes), at(barrier)]
            .into_iter()
            .chain(hint.map(reg))
            .collect(),
        Op::BulkStore { dst, src, bytes }
        | Op::BulkReduceAdd {
            dst, src, bytes, ..
        } => {
            vec![at(dst), at(src), value(Ty::U32, bytes)]
        }
        Op::BulkWait { pending, .. } | Op::WgmmaWait { pending } => vec![pending.to_string()],
        Op::CachePolicy { dst, .. } => vec![reg(dst), "1.0".into()],

        Op::Wgmma { .. } => wgmma(op, names),
        Op::SetMaxRegisters { count, .. } => vec![count.to_string()],
        Op::Sleep { nanoseconds } => vec![value(Ty::U32, nanoseconds)],

        Op::Fence(_)
        | Op::ClusterArrive
        | Op::ClusterWait
        | Op::BulkCommit
        | Op::WgmmaFence
        | Op::WgmmaCommit
        | Op::GridWait
        | Op::GridLaunch
        | Op::Trap => Vec::new(),
    }
}

fn wgmma(op: &Op, names: &Names<'_>) -> Vec<String> {
    let Op::Wgmma {
        element,
        acc,
        a,
        b,
        b_transposed,
        accumulate,
        ..
    } = op
    else {
        return Vec::new();
    };
    let (a, a_transposed) = match a {
        MatrixA::Shared {
            descriptor,
            transposed,
        } => (names.operand(Ty::B64, *descriptor), Some(*transposed)),
        MatrixA::Registers(registers) => (names.registers(registers), None),
    };
    let b = names.operand(Ty::B64, *b);
    let accumulate = names.operand(Ty::Pred, *accumulate);
    let mut texts = vec![
        names.registers(acc),
        a,
        b,
        accumulate,
        "1".into(),
        "1".into(),
    ];
    // Only of 16-bit elements can a matrix be transposed, and then PTX wants it said; `a` in
    // registers never is.
    if element.bytes() == 2 {
        let transposes = a_transposed.into_iter().chain([*b_transposed]);
        texts.extend(transposes.map(|transposed| u32::from(transposed).to_string()));
    }
    texts
}
