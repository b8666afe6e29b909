//! The ACPI tables that describe the PC to a stock Linux (ACPI 6.5): what cannot be probed, and nothing else.
//!
//! ```text
//!  RSDP ─► XSDT ─► FADT ─► DSDT   \_SB: COM1, RTC_, VIR0 ... (virtio-mmio, LNRO0005); \_S5
//!                    └───► FACS
//! ```
//! There is no MADT: a kernel then routes interrupts through the pair of 8259A.

use acpi_tables::{
    Aml,
    aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope},
    facs::FACS,
    fadt::{FADT, FADTBuilder, Flags, PmProfile},
    gas::{AccessSize, AddressSpace, GAS},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};

use super::{
    FIRST_VIRTIO_IRQ, RESET_PORT, RESET_VALUE, SCI_IRQ, SERIAL_IRQ, VIRTIO_BASE, VIRTIO_DEVICES_MAX, power, rtc,
    virtio_mmio::WINDOW_BYTES,
};

const OEM: [u8; 6] = *b"FTVM  ";
const OEM_TABLE: [u8; 8] = *b"FTLINUX ";
const OEM_REVISION: u32 = 1;
/// Boot architecture flags: no VGA, no MSI. That there is no 8042 is a flag not set.
const NO_VGA_NO_MSI: u16 = 1 << 2 | 1 << 3;
/// The FACS wants this alignment.
const ALIGNMENT: u64 = 64;
const SDT_HEADER_BYTES: u32 = 36;
const DSDT_REVISION: u8 = 2;
/// Larger than the real latencies of any CPU: there is no C2 and no C3.
const NO_C2_LATENCY: u16 = 101;
const NO_C3_LATENCY: u16 = 1001;

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn io(port: u16, length: u8) -> IO {
    IO::new(port, port, 1, length)
}

fn irq(number: u8, edge: bool) -> Interrupt {
    Interrupt::new(true, edge, false, false, u32::from(number))
}

fn dsdt() -> Vec<u8> {
    let hid = |name: &str| Name::new(Path::new("_HID"), &EISAName::new(name));
    let uid = |number: usize| Name::new(Path::new("_UID"), &number);
    let crs = |children: Vec<&dyn Aml>| Name::new(Path::new("_CRS"), &ResourceTemplate::new(children));

    let (serial_hid, serial_uid) = (hid("PNP0501"), uid(1));
    let serial_crs = crs(vec![&io(0x3f8, 8), &irq(SERIAL_IRQ, true)]);
    let serial = Device::new(Path::new("COM1"), vec![&serial_hid, &serial_uid, &serial_crs]);
    let rtc_hid = hid("PNP0B00");
    let rtc_crs = crs(vec![&io(0x70, 2), &irq(super::RTC_IRQ, true)]);
    let clock = Device::new(Path::new("RTC_"), vec![&rtc_hid, &rtc_crs]);
    let mut namespace = bytes(&Scope::new(Path::new("_SB_"), vec![&serial, &clock]));

    for index in 0..VIRTIO_DEVICES_MAX {
        let virtio_hid = Name::new(Path::new("_HID"), &"LNRO0005");
        let virtio_uid = uid(index);
        let window = Memory32Fixed::new(
            true,
            (VIRTIO_BASE + index as u64 * WINDOW_BYTES) as u32,
            WINDOW_BYTES as u32,
        );
        let virtio_crs = crs(vec![&window, &irq(FIRST_VIRTIO_IRQ + index as u8, false)]);
        let name = format!("VIR{index}");
        let device = Device::new(Path::new(&name), vec![&virtio_hid, &virtio_uid, &virtio_crs]);
        namespace.extend(bytes(&Scope::new(Path::new("_SB_"), vec![&device])));
    }
    let off = Package::new(vec![&power::SLEEP_TYPE_OFF, &0u8, &0u8, &0u8]);
    namespace.extend(bytes(&Name::new(Path::new("_S5_"), &off)));

    let mut table = Sdt::new(*b"DSDT", SDT_HEADER_BYTES, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&namespace);
    table.as_slice().to_vec()
}

fn port_register(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(port))
}

fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    table.dsdt = (dsdt as u32).into();
    table.x_dsdt = dsdt.into();
    table.sci_int = u16::from(SCI_IRQ).into();
    table.p_lvl2_lat = NO_C2_LATENCY.into();
    table.p_lvl3_lat = NO_C3_LATENCY.into();
    table.century = rtc::CENTURY as u8;
    table.iapc_boot_arch = NO_VGA_NO_MSI.into();
    table.pm1a_evt_blk = u32::from(power::EVENT_PORT).into();
    table.pm1a_cnt_blk = u32::from(power::CONTROL_PORT).into();
    table.pm_tmr_blk = u32::from(power::TIMER_PORT).into();
    (table.pm1_evt_len, table.pm1_cnt_len, table.pm_tmr_len) = (4, 2, 4);
    table.x_pm1a_evt_blk = port_register(power::EVENT_PORT, 32, AccessSize::WordAccess);
    table.x_pm1a_cnt_blk = port_register(power::CONTROL_PORT, 16, AccessSize::WordAccess);
    table.x_pm_tmr_blk = port_register(power::TIMER_PORT, 32, AccessSize::DwordAccess);
    table.reset_reg = port_register(RESET_PORT, 8, AccessSize::ByteAccess);
    table.reset_value = RESET_VALUE;
    bytes(&table.finalize())
}

/// All tables as they lie in memory from `base` on, the RSDP first. `base` is below 4 GiB and aligned to 64 bytes.
#[must_use]
pub fn tables(base: u64) -> Vec<u8> {
    let align = |address: u64| address.next_multiple_of(ALIGNMENT);
    let (facs, dsdt) = (bytes(&FACS::new()), dsdt());
    let facs_at = align(base + Rsdp::len() as u64);
    let dsdt_at = align(facs_at + facs.len() as u64);
    let fadt_at = align(dsdt_at + dsdt.len() as u64);
    let xsdt_at = align(fadt_at + FADT::len() as u64);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt_at);
    let parts = [
        (base, bytes(&Rsdp::new(OEM, xsdt_at))),
        (facs_at, facs),
        (dsdt_at, dsdt),
        (fadt_at, fadt(facs_at, dsdt_at)),
        (xsdt_at, bytes(&xsdt)),
    ];
    let mut image = Vec::new();
    for (address, part) in parts {
        image.resize((address - base) as usize, 0);
        image.extend(part);
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xe_0000;

    fn word(image: &[u8], address: u64) -> u64 {
        let at = (address - BASE) as usize;
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
    }

    fn table(image: &[u8], address: u64) -> &[u8] {
        let at = (address - BASE) as usize;
        let length = u32::from_le_bytes(image[at + 4..at + 8].try_into().unwrap()) as usize;
        &image[at..at + length]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_found_from_the_root_and_sums_to_zero() {
        let image = tables(BASE);
        assert_eq!(
            (&image[..8], sum(&image[..20]), sum(&image[..36])),
            (&b"RSD PTR "[..], 0, 0)
        );
        let xsdt = table(&image, word(&image, BASE + 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let fadt = table(&image, u64::from_le_bytes(xsdt[36..44].try_into().unwrap()));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        let facs_at = u32::from_le_bytes(fadt[36..40].try_into().unwrap());
        assert_eq!(
            (&table(&image, u64::from(facs_at))[..4], facs_at % 64),
            (&b"FACS"[..], 0)
        );
        let dsdt = table(&image, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        for name in ["LNRO0005", "COM1", "RTC_", "VIR0", "VIR1", "_S5_"] {
            assert!(
                dsdt.windows(name.len()).any(|window| window == name.as_bytes()),
                "no {name}"
            );
        }
    }

    #[test]
    fn the_fixed_registers_are_where_the_board_has_them() {
        let image = tables(BASE);
        let xsdt = table(&image, word(&image, BASE + 24));
        let fadt = table(&image, u64::from_le_bytes(xsdt[36..44].try_into().unwrap()));
        let field = |at: usize| u32::from_le_bytes(fadt[at..at + 4].try_into().unwrap());
        assert_eq!((field(56), field(64), field(76)), (0x600, 0x604, 0x608));
        assert_eq!(u16::from_le_bytes([fadt[46], fadt[47]]), 9, "SCI");
        let reset_at = u64::from_le_bytes(fadt[120..128].try_into().unwrap());
        assert_eq!((fadt[116], reset_at, fadt[128]), (1, 0x64, 0xfe), "reset register");
    }
}
