//! The driver's library: found at run time, and the calls we make of it, each a method.
//!
//! All that is foreign lies in this file: symbols, types, constants. A method of [`Driver`] calls
//! the symbol of the same row of the table and turns its status into a [`Result`] that names it.
//!
//! Signatures and constants: CUDA driver API reference, 13.0. All but one are in every driver since
//! 12.0; newer ones keep them. Kernels are printed as PTX 8.1, which is 12.1's.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

use crate::Error;

/// A GPU's ordinal among the driver's.
pub(crate) type DeviceHandle = c_int;

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(transparent)]
        pub(crate) struct $name(pub(crate) *mut c_void);

        // SAFETY: a handle is a number to us, only ever handed back to the driver, whose calls may
        // be made from any thread.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}

        impl $name {
            pub(crate) const NULL: Self = Self(ptr::null_mut());
        }
    )*};
}

handles! {
    /// A context.
    Context;
    /// Loaded code.
    ModuleHandle;
    /// A kernel of a module.
    FunctionHandle;
    /// An event.
    EventHandle;
}

/// A stream: the handle that the driver, the runtime and torch (`Stream.cuda_stream`) know it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Stream(pub usize);

impl Stream {
    /// The legacy default stream, torch's default.
    pub const DEFAULT: Self = Self(0);
}

/// `CUlaunchAttribute`: what it is and, in 64 bytes, its value.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct LaunchAttribute {
    pub(crate) id: c_int,
    pub(crate) pad: [u8; 4],
    pub(crate) value: [u32; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
pub(crate) struct LaunchConfig {
    pub(crate) grid: [c_uint; 3],
    pub(crate) block: [c_uint; 3],
    pub(crate) shared_bytes: c_uint,
    pub(crate) stream: Stream,
    pub(crate) attributes: *const LaunchAttribute,
    pub(crate) attribute_count: c_uint,
}

/// `CUtensorMap`: what the TMA unit reads, opaque.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct EncodedMap(pub(crate) [u64; 16]);

pub(crate) const LAUNCH_ATTRIBUTE_CLUSTER: c_int = 4;
pub(crate) const LAUNCH_ATTRIBUTE_EARLY: c_int = 6;
pub(crate) const FUNCTION_LOCAL_BYTES: c_int = 3;
pub(crate) const FUNCTION_REGISTERS: c_int = 4;
pub(crate) const FUNCTION_SHARED_BYTES: c_int = 8;
pub(crate) const DEVICE_MULTIPROCESSORS: c_int = 16;
pub(crate) const DEVICE_MAJOR: c_int = 75;
pub(crate) const DEVICE_MINOR: c_int = 76;
pub(crate) const JIT_ERROR_LOG: c_int = 5;
pub(crate) const JIT_ERROR_LOG_BYTES: c_int = 6;
/// Events that carry a time.
pub(crate) const EVENT_DEFAULT: c_uint = 0;

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident = $symbol:literal ($($arg:ident: $ty:ty),*);)*) => {
        struct Symbols {
            $($name: unsafe extern "C" fn($($ty),*) -> c_int,)*
        }

        impl Symbols {
            /// # Safety
            /// `library` is the CUDA driver's: its symbols have the table's signatures.
            unsafe fn of(library: &Library) -> Result<Self, libloading::Error> {
                // SAFETY: by the caller's word; the pointers are used while the library is loaded,
                // which `Driver` keeps for ever.
                unsafe { Ok(Self { $($name: *library.get($symbol)?,)* }) }
            }
        }

        impl Driver {
            $($(#[$doc])*
            ///
            /// # Safety
            /// As the driver's documentation of the call asks.
            #[allow(clippy::too_many_arguments)]
            pub(crate) unsafe fn $name(&self, $($arg: $ty),*) -> Result<(), Error> {
                // SAFETY: the symbol has this signature; the rest is the caller's word.
                let code = unsafe { (self.symbols.$name)($($arg),*) };
                self.checked($symbol, code)
            })*
        }
    };
}

calls! {
    /// Starts the driver.
    init = "cuInit" (flags: c_uint);
    /// The driver's version, as 1000 major + 10 minor.
    version = "cuDriverGetVersion" (version: *mut c_int);
    /// How many GPUs there are.
    device_count = "cuDeviceGetCount" (count: *mut c_int);
    /// A GPU.
    device_get = "cuDeviceGet" (device: *mut DeviceHandle, ordinal: c_int);
    /// Its name, ending in 0.
    device_name = "cuDeviceGetName" (name: *mut c_char, len: c_int, device: DeviceHandle);
    /// Its memory.
    device_memory = "cuDeviceTotalMem_v2" (bytes: *mut usize, device: DeviceHandle);
    /// A property.
    device_attribute = "cuDeviceGetAttribute"
        (value: *mut c_int, attribute: c_int, device: DeviceHandle);
    /// Its primary context, made if need be.
    primary_context = "cuDevicePrimaryCtxRetain" (context: *mut Context, device: DeviceHandle);
    /// The calling thread's context.
    context_current = "cuCtxGetCurrent" (context: *mut Context);
    /// Puts a context on the calling thread's stack.
    context_push = "cuCtxPushCurrent_v2" (context: Context);
    /// Takes it off.
    context_pop = "cuCtxPopCurrent_v2" (context: *mut Context);
    /// Compiles PTX, or finds it compiled, and loads it into the current context.
    module_load = "cuModuleLoadDataEx" (
        module: *mut ModuleHandle, ptx: *const c_void, count: c_uint, options: *const c_int,
        values: *const *mut c_void
    );
    /// Unloads it.
    module_unload = "cuModuleUnload" (module: ModuleHandle);
    /// A kernel of it.
    module_function = "cuModuleGetFunction"
        (function: *mut FunctionHandle, module: ModuleHandle, name: *const c_char);
    /// A property of a kernel.
    function_get = "cuFuncGetAttribute"
        (value: *mut c_int, attribute: c_int, function: FunctionHandle);
    /// Sets a property of a kernel.
    function_set = "cuFuncSetAttribute" (function: FunctionHandle, attribute: c_int, value: c_int);
    /// Launches a kernel.
    launch = "cuLaunchKernelEx" (
        config: *const LaunchConfig, function: FunctionHandle, args: *const *const c_void,
        extra: *const *const c_void
    );
    /// Encodes a tensor map.
    tensor_map = "cuTensorMapEncodeTiled" (
        map: *mut EncodedMap, element: c_int, rank: c_uint, address: u64, dims: *const u64,
        strides: *const u64, tile: *const u32, steps: *const u32, interleave: c_int,
        swizzle: c_int, promotion: c_int, fill: c_int
    );
    /// Allocates device memory.
    alloc = "cuMemAlloc_v2" (address: *mut u64, bytes: usize);
    /// Frees it.
    free = "cuMemFree_v2" (address: u64);
    /// Copies to the device.
    copy_in = "cuMemcpyHtoD_v2" (to: u64, from: *const c_void, bytes: usize);
    /// Copies to the device, on a stream; of memory that is not pinned the driver has made a copy when
    /// this returns.
    copy_in_later = "cuMemcpyHtoDAsync_v2"
        (to: u64, from: *const c_void, bytes: usize, stream: Stream);
    /// Copies from it.
    copy_out = "cuMemcpyDtoH_v2" (to: *mut c_void, from: u64, bytes: usize);
    /// Fills with a byte.
    fill = "cuMemsetD8_v2" (to: u64, value: u8, bytes: usize);
    /// Fills with a word, on a stream.
    fill_words = "cuMemsetD32Async" (to: u64, value: c_uint, words: usize, stream: Stream);
    /// What tells a stream from all others that the process ever has.
    stream_id = "cuStreamGetId" (stream: Stream, id: *mut u64);
    /// Whether it is being captured into a graph: 0 if not.
    stream_capturing = "cuStreamIsCapturing" (stream: Stream, status: *mut c_int);
    /// Waits for a stream.
    stream_wait = "cuStreamSynchronize" (stream: Stream);
    /// Makes an event.
    event_create = "cuEventCreate" (event: *mut EventHandle, flags: c_uint);
    /// Records it on a stream.
    event_record = "cuEventRecord" (event: EventHandle, stream: Stream);
    /// Waits for it.
    event_wait = "cuEventSynchronize" (event: EventHandle);
    /// Milliseconds between two.
    event_elapsed = "cuEventElapsedTime" (ms: *mut f32, start: EventHandle, end: EventHandle);
    /// Ends it.
    event_destroy = "cuEventDestroy_v2" (event: EventHandle);
}

type ErrorText = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;
type FunctionLoad = unsafe extern "C" fn(FunctionHandle) -> c_int;

/// The driver, loaded and started.
pub(crate) struct Driver {
    symbols: Symbols,
    error_name: ErrorText,
    error_text: ErrorText,
    /// Since 12.4.
    function_load: Option<FunctionLoad>,
}

/// The CUDA version that a driver must have, as it counts: its PTX is what we print.
const OLDEST: c_int = 12_010;
/// The first driver that has it.
const OLDEST_RELEASE: &str = "530";

/// What the driver's library is called.
const NAMES: [&str; 2] = if cfg!(windows) {
    ["nvcuda.dll", "nvcuda64.dll"]
} else {
    ["libcuda.so.1", "libcuda.so"]
};

impl Driver {
    /// The driver, loaded by the first call.
    pub(crate) fn get() -> Result<&'static Self, Error> {
        static DRIVER: OnceLock<Result<Driver, Error>> = OnceLock::new();
        DRIVER
            .get_or_init(|| Self::load(&NAMES))
            .as_ref()
            .map_err(Clone::clone)
    }

    fn load(names: &[&str]) -> Result<Self, Error> {
        let unavailable = |reason| Error::Unavailable { reason };
        let library = names
            .iter()
            // SAFETY: the names are those of NVIDIA's driver, whose initialisers may run anywhere.
            .find_map(|name| unsafe { Library::new(*name) }.ok())
            .ok_or_else(|| {
                unavailable(format!(
                    "the NVIDIA driver is not installed ({} not found)",
                    names[0]
                ))
            })?;
        let old = |reason: &dyn fmt::Display| {
            let needed = format!("release {OLDEST_RELEASE} (CUDA 12.1) or newer is needed");
            unavailable(format!("the NVIDIA driver is too old, {needed}: {reason}"))
        };
        let missing = |error: libloading::Error| old(&error);
        // SAFETY: it is the driver's library, found under the driver's name.
        let driver = unsafe {
            Self {
                symbols: Symbols::of(&library).map_err(missing)?,
                error_name: *library.get("cuGetErrorName").map_err(missing)?,
                error_text: *library.get("cuGetErrorString").map_err(missing)?,
                function_load: library.get("cuFuncLoad").ok().map(|symbol| *symbol),
            }
        };
        // The driver must not be unloaded while its threads run, that is: never.
        std::mem::forget(library);
        // SAFETY: no arguments that could be wrong.
        unsafe { driver.init(0) }.map_err(|error| match error {
            Error::Call { text, .. } => unavailable(format!("the NVIDIA driver says: {text}")),
            other => other,
        })?;
        let mut version = 0;
        // SAFETY: the result goes to a variable of its type.
        unsafe { driver.version(&raw mut version)? };
        if version < OLDEST {
            return Err(old(&format!(
                "it has CUDA {}.{}",
                version / 1000,
                version % 1000 / 10
            )));
        }
        Ok(driver)
    }

    /// Loads a kernel's code now, where the driver can, rather than at its first launch: that may
    /// come while a graph is captured, when loading is not allowed.
    ///
    /// # Safety
    /// `function` is a kernel of the current context.
    pub(crate) unsafe fn load_now(&self, function: FunctionHandle) -> Result<(), Error> {
        match self.function_load {
            None => Ok(()),
            // SAFETY: by the caller's word.
            Some(load) => self.checked("cuFuncLoad", unsafe { load(function) }),
        }
    }

    fn checked(&self, call: &'static str, code: c_int) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        let describe = |function: ErrorText| {
            let mut text = ptr::null();
            // SAFETY: the driver writes the address of a constant string, or null.
            unsafe {
                if function(code, &raw mut text) != 0 || text.is_null() {
                    return format!("code {code}");
                }
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        Err(Error::Call {
            call,
            code,
            name: describe(self.error_name),
            text: describe(self.error_text),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_is_a_value() {
        let Err(error) = Driver::load(&["no-such-library.so"]) else {
            panic!("loaded");
        };
        assert_eq!(
            error.to_string(),
            "no CUDA device: the NVIDIA driver is not installed (no-such-library.so not found)"
        );
    }

    #[test]
    fn another_library_is_not_taken_for_the_driver() {
        let names = ["libc.so.6", "libSystem.dylib", "kernel32.dll"];
        let Err(Error::Unavailable { reason }) = Driver::load(&names) else {
            panic!("loaded");
        };
        assert!(reason.contains("too old"), "{reason}");
    }

    #[test]
    fn records_have_the_drivers_layout() {
        assert_eq!(size_of::<LaunchAttribute>(), 72);
        assert_eq!(std::mem::offset_of!(LaunchAttribute, value), 8);
        assert_eq!(size_of::<LaunchConfig>(), 56);
        assert_eq!(std::mem::offset_of!(LaunchConfig, stream), 32);
        assert_eq!(
            (size_of::<EncodedMap>(), align_of::<EncodedMap>()),
            (128, 64)
        );
    }
}
