//! Loads, stores and atomics of one thread, and the matrix loads and stores of a warp.

use super::{Builder, Reg, Value};
use crate::ir::{self, AtomicOp, Cache, Fence, Op, Operand, Order, RegId, Scope, Space};
use crate::{Scalar, Ty};

/// An address: a register and a constant added to it. `A` is `u32` for shared memory and `u64` for
/// global memory.
#[derive(Debug)]
pub struct Address<'k, A> {
    base: Reg<'k, A>,
    offset: i32,
}

impl<A> Clone for Address<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for Address<'_, A> {}

/// What can be taken for an address: an [`Address`], or a register that holds one.
pub trait AddressOf<A> {
    /// As the instruction's operand.
    fn address(self) -> ir::Address;
}

impl<A> AddressOf<A> for Address<'_, A> {
    fn address(self) -> ir::Address {
        ir::Address {
            base: self.base.id,
            offset: self.offset,
        }
    }
}

impl<A> AddressOf<A> for Reg<'_, A> {
    fn address(self) -> ir::Address {
        ir::Address {
            base: self.id,
            offset: 0,
        }
    }
}

impl<'k, A> Address<'k, A> {
    /// The address `bytes` further.
    ///
    /// # Panics
    /// If the constant leaves 32 bits.
    pub fn at(self, bytes: u32) -> Self {
        let bytes = i32::try_from(bytes).expect("an offset below 2 GB");
        Self {
            base: self.base,
            offset: self.offset.checked_add(bytes).expect("below 2 GB"),
        }
    }
}

impl<'k> Address<'k, u32> {
    /// The same place in block `rank` of the cluster, see [`Builder::map_shared`].
    #[track_caller]
    pub fn in_block(self, rank: Reg<'k, u32>) -> Self {
        Self {
            base: self.base.builder().map_shared(self.base, rank),
            offset: self.offset,
        }
    }

    /// The address `bytes` further, a number known at run time.
    #[track_caller]
    pub fn plus(self, bytes: Reg<'k, u32>) -> Self {
        Self {
            base: self.base + bytes,
            offset: self.offset,
        }
    }
}

impl<'k, A> Reg<'k, A> {
    /// The address `bytes` behind the one in this register.
    pub fn at(self, bytes: u32) -> Address<'k, A> {
        Address {
            base: self,
            offset: 0,
        }
        .at(bytes)
    }
}

impl Builder {
    // ---- global memory -------------------------------------------------------------------------

    /// Loads a `T`.
    #[track_caller]
    pub fn load_global<T: Scalar>(&self, address: impl AddressOf<u64>) -> Reg<'_, T> {
        let [value] = self.load_vector(Space::Global, Cache::Default, address.address());
        value
    }

    /// Loads a `T` that nothing writes while the kernel runs.
    #[track_caller]
    pub fn load_constant<T: Scalar>(&self, address: impl AddressOf<u64>) -> Reg<'_, T> {
        let [value] = self.load_vector(Space::Global, Cache::Constant, address.address());
        value
    }

    /// Loads `N` (2 or 4) neighbours that nothing writes while the kernel runs; the address is a
    /// multiple of their size.
    #[track_caller]
    pub fn load_constants<T: Scalar, const N: usize>(
        &self,
        address: impl AddressOf<u64>,
    ) -> [Reg<'_, T>; N] {
        self.load_vector(Space::Global, Cache::Constant, address.address())
    }

    /// Loads `N` (2 or 4) neighbours; the address is a multiple of their size.
    #[track_caller]
    pub fn load_globals<T: Scalar, const N: usize>(
        &self,
        address: impl AddressOf<u64>,
    ) -> [Reg<'_, T>; N] {
        self.load_vector(Space::Global, Cache::Default, address.address())
    }

    /// Loads a byte, with zeros above.
    #[track_caller]
    pub fn load_global_byte(&self, address: impl AddressOf<u64>) -> Reg<'_, u32> {
        let byte = self.uninit::<u16>();
        self.emit(Op::Load {
            space: Space::Global,
            cache: Cache::Default,
            ty: Ty::U8,
            dst: vec![byte.id],
            address: address.address(),
        });
        byte.to_u32()
    }

    /// Loads `N` (1, 2 or 4) neighbours that nothing writes while the kernel runs, in lanes where
    /// `cond` holds; the others read nothing and get zeros.
    ///
    /// # Panics
    /// Inside of [`Builder::where_`].
    #[track_caller]
    pub fn load_constants_where<T: Scalar, const N: usize>(
        &self,
        cond: Reg<'_, bool>,
        address: impl AddressOf<u64>,
    ) -> [Reg<'_, T>; N] {
        let values: [Reg<'_, T>; N] = std::array::from_fn(|_| self.uninit());
        let dst = values.map(Reg::id).to_vec();
        let from = (Space::Global, Cache::Constant);
        self.load_or_zero(cond, from, T::TY, dst, address.address());
        values
    }

    /// Loads a byte that nothing writes while the kernel runs, with zeros above, in lanes where
    /// `cond` holds; the others read nothing and get 0.
    ///
    /// # Panics
    /// Inside of [`Builder::where_`].
    #[track_caller]
    pub fn load_constant_byte_where(
        &self,
        cond: Reg<'_, bool>,
        address: impl AddressOf<u64>,
    ) -> Reg<'_, u32> {
        let byte = self.uninit::<u16>();
        let from = (Space::Global, Cache::Constant);
        self.load_or_zero(cond, from, Ty::U8, vec![byte.id], address.address());
        byte.to_u32()
    }

    #[track_caller]
    fn load_or_zero(
        &self,
        cond: Reg<'_, bool>,
        (space, cache): (Space, Cache),
        ty: Ty,
        dst: Vec<RegId>,
        address: ir::Address,
    ) {
        // Registers have no 8-bit types.
        let whole = if ty == Ty::U8 { Ty::U16 } else { ty };
        for &dst in &dst {
            let src = Operand::Imm(0);
            self.emit(Op::Mov {
                ty: whole,
                dst,
                src,
            });
        }
        let load = Op::Load {
            space,
            cache,
            ty,
            dst,
            address,
        };
        self.emit_where(cond, load);
    }

    /// Stores a `T`.
    #[track_caller]
    pub fn store_global<T: Scalar>(&self, address: impl AddressOf<u64>, value: Reg<'_, T>) {
        self.store_vector(Space::Global, address.address(), [value]);
    }

    /// Stores the lower byte of 16 bits.
    #[track_caller]
    pub fn store_global_byte(&self, address: impl AddressOf<u64>, bits: Reg<'_, u16>) {
        let src = vec![bits.operand()];
        self.emit(Op::Store {
            space: Space::Global,
            ty: Ty::U8,
            src,
            address: address.address(),
        });
    }

    /// Stores `N` (2 or 4) neighbours; the address is a multiple of their size.
    #[track_caller]
    pub fn store_globals<T: Scalar, const N: usize>(
        &self,
        address: impl AddressOf<u64>,
        values: [Reg<'_, T>; N],
    ) {
        self.store_vector(Space::Global, address.address(), values);
    }

    /// Loads a word with acquire order: what its writer released before is seen after.
    #[track_caller]
    pub fn load_acquire(&self, address: impl AddressOf<u64>, scope: Scope) -> Reg<'_, u32> {
        let address = address.address();
        self.write(|dst| Op::LoadAcquire {
            scope,
            ty: Ty::U32,
            dst,
            address,
        })
    }

    /// Stores a word with release order.
    #[track_caller]
    pub fn store_release(
        &self,
        address: impl AddressOf<u64>,
        value: impl Value<u32>,
        scope: Scope,
    ) {
        let (src, address) = (value.operand(), address.address());
        self.emit(Op::StoreRelease {
            scope,
            ty: Ty::U32,
            src,
            address,
        });
    }

    /// Adds to a word; gives what it held. Atomic for the whole device, orders nothing else.
    #[track_caller]
    pub fn atomic_add_global(
        &self,
        address: impl AddressOf<u64>,
        value: impl Value<u32>,
    ) -> Reg<'_, u32> {
        let (address, src) = (address.address(), value.operand());
        self.write(|dst| Op::Atomic {
            op: AtomicOp::Add,
            order: Order::Relaxed,
            scope: Scope::Gpu,
            space: Space::Global,
            ty: Ty::U32,
            dst,
            address,
            src,
            swap: None,
        })
    }

    /// Leaves the larger of a word and `value` in memory. Atomic for the whole device, orders nothing
    /// else.
    #[track_caller]
    pub fn reduce_max_global(&self, address: impl AddressOf<u64>, value: impl Value<u32>) {
        self.emit(Op::Reduce {
            op: AtomicOp::Max,
            scope: Scope::Gpu,
            space: Space::Global,
            ty: Ty::U32,
            address: address.address(),
            src: vec![value.operand()],
        });
    }

    /// Adds float32 neighbours (1, 2 or 4) to memory, each atomically, in any order.
    #[track_caller]
    pub fn reduce_add_global<const N: usize>(
        &self,
        address: impl AddressOf<u64>,
        values: [Reg<'_, f32>; N],
    ) {
        self.emit(Op::Reduce {
            op: AtomicOp::Add,
            scope: Scope::Gpu,
            space: Space::Global,
            ty: Ty::F32,
            address: address.address(),
            src: values.map(Value::operand).to_vec(),
        });
    }

    // ---- shared memory -------------------------------------------------------------------------

    /// Loads a `T`.
    #[track_caller]
    pub fn load_shared<T: Scalar>(&self, address: impl AddressOf<u32>) -> Reg<'_, T> {
        let [value] = self.load_vector(Space::Shared, Cache::Default, address.address());
        value
    }

    /// Loads `N` (2 or 4) neighbours; the address is a multiple of their size.
    #[track_caller]
    pub fn load_shareds<T: Scalar, const N: usize>(
        &self,
        address: impl AddressOf<u32>,
    ) -> [Reg<'_, T>; N] {
        self.load_vector(Space::Shared, Cache::Default, address.address())
    }

    /// Loads a word in lane 0, and gives it to all lanes, see [`Reg::uniform`]. When lane 0 then arrives
    /// at a barrier, or itself stores another word there, that does not race with the loads of the
    /// others: they have none.
    #[track_caller]
    pub fn load_shared_uniform(&self, address: impl AddressOf<u32>) -> Reg<'_, u32> {
        self.load_in_first_lane(address).uniform()
    }

    /// Likewise, of some words that follow each other, the bits that any of them has.
    ///
    /// # Panics
    /// If there are none.
    #[track_caller]
    pub fn load_shared_uniform_any<'k>(
        &'k self,
        address: Address<'k, u32>,
        words: u32,
    ) -> Reg<'k, u32> {
        let words = (0..words).map(|i| self.load_in_first_lane(address.at(4 * i)));
        let any = words.reduce(|any, word| any | word).expect("some words");
        any.uniform()
    }

    /// A word in lane 0, zero in others.
    #[track_caller]
    fn load_in_first_lane(&self, address: impl AddressOf<u32>) -> Reg<'_, u32> {
        // Straight into a register that has been written: ptxas would keep the old contents of one that
        // has not, for lanes that load nothing.
        let word = self.uninit::<u32>();
        let from = (Space::Shared, Cache::Default);
        let cond = self.lane().equals(0);
        self.load_or_zero(cond, from, Ty::U32, vec![word.id], address.address());
        word
    }

    /// Stores a `T`.
    #[track_caller]
    pub fn store_shared<T: Scalar>(&self, address: impl AddressOf<u32>, value: Reg<'_, T>) {
        self.store_vector(Space::Shared, address.address(), [value]);
    }

    /// Stores a `T` to the shared memory of a block of the cluster, its address being from
    /// [`Builder::map_shared`].
    #[track_caller]
    pub fn store_cluster<T: Scalar>(&self, address: impl AddressOf<u32>, value: Reg<'_, T>) {
        self.store_vector(Space::Cluster, address.address(), [value]);
    }

    /// Stores `N` (2 or 4) neighbours; the address is a multiple of their size.
    #[track_caller]
    pub fn store_shareds<T: Scalar, const N: usize>(
        &self,
        address: impl AddressOf<u32>,
        values: [Reg<'_, T>; N],
    ) {
        self.store_vector(Space::Shared, address.address(), values);
    }

    /// Adds to a word of shared memory; gives what it held.
    #[track_caller]
    pub fn atomic_add_shared(
        &self,
        address: impl AddressOf<u32>,
        value: impl Value<u32>,
    ) -> Reg<'_, u32> {
        let (address, src) = (address.address(), value.operand());
        self.write(|dst| Op::Atomic {
            op: AtomicOp::Add,
            order: Order::Relaxed,
            scope: Scope::Cta,
            space: Space::Shared,
            ty: Ty::U32,
            dst,
            address,
            src,
            swap: None,
        })
    }

    /// A warp loads `N` (1, 2 or 4) 8 x 8 matrices of 16-bit elements: lane `8 i + r` gives the
    /// address of row `r` of matrix `i` and gets elements `2 (lane % 4)` and the next of row
    /// `lane / 4` of each.
    #[track_caller]
    pub fn load_matrices<const N: usize>(
        &self,
        address: impl AddressOf<u32>,
        transposed: bool,
    ) -> [Reg<'_, u32>; N] {
        let values: [Reg<'_, u32>; N] = std::array::from_fn(|_| self.uninit());
        let (dst, address) = (values.map(Reg::id).to_vec(), address.address());
        self.emit(Op::LoadMatrix {
            transposed,
            dst,
            address,
        });
        values
    }

    /// The reverse of [`Builder::load_matrices`].
    #[track_caller]
    pub fn store_matrices<const N: usize>(
        &self,
        address: impl AddressOf<u32>,
        values: [Reg<'_, u32>; N],
        transposed: bool,
    ) {
        let (src, address) = (values.map(Reg::id).to_vec(), address.address());
        self.emit(Op::StoreMatrix {
            transposed,
            src,
            address,
        });
    }

    /// A fence.
    #[track_caller]
    pub fn fence(&self, fence: Fence) {
        self.emit(Op::Fence(fence));
    }

    // ---- both ----------------------------------------------------------------------------------

    #[track_caller]
    fn load_vector<T: Scalar, const N: usize>(
        &self,
        space: Space,
        cache: Cache,
        address: ir::Address,
    ) -> [Reg<'_, T>; N] {
        let values: [Reg<'_, T>; N] = std::array::from_fn(|_| self.uninit());
        let dst = values.map(Reg::id).to_vec();
        self.emit(Op::Load {
            space,
            cache,
            ty: T::TY,
            dst,
            address,
        });
        values
    }

    #[track_caller]
    fn store_vector<T: Scalar, const N: usize>(
        &self,
        space: Space,
        address: ir::Address,
        values: [Reg<'_, T>; N],
    ) {
        let src = values.map(Value::operand).to_vec();
        self.emit(Op::Store {
            space,
            ty: T::TY,
            src,
            address,
        });
    }
}
