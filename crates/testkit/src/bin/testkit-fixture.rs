//! The programs under test, by name: `testkit-fixture NAME DIRECTORY`.

use std::process::ExitCode;

fn main() -> ExitCode {
    testkit::program::main()
}
