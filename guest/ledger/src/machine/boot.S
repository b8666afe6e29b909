// Ring 0: everything that must run there, and nothing else.
//
// Plain integer instructions only: on a KVM that emulates ring 0 nothing else is promised. Rust code may use SSE, so
// none of it runs here.
//
//   _start ──► ring 3 (ring3_main) ──ud2──► undefined_opcode ──► wait / console / power off ──iretq──► ring 3
//                     ▲                                              │ sti; hlt
//                     └───────────── interrupt_* (lower the line, note it in `pending`) ◄──┘
//
// Contract of the `ud2` call (traps.rs is the other side): r10 = CALL_MAGIC, rax = function; rcx, rdx, rsi, rdi are
// clobbered, everything else is kept.

.set CALL_MAGIC, 0x4C454447
.set KERNEL_CODE, 0x10
.set USER_DATA, 0x2B
.set USER_CODE, 0x33
.set TASK_STATE, 0x40
.set COMMAND_LINE_SIZE, 512       // as in boot.rs

.set BLOCK_QUEUE_NOTIFY, 0xD0000050
.set BLOCK_INTERRUPT_ACK, 0xD0000064
.set NETWORK_QUEUE_NOTIFY, 0xD0001050
.set NETWORK_INTERRUPT_ACK, 0xD0001064
.set CLOCK_NOW, 0xD000F000
.set CLOCK_ALARM, 0xD000F008

.set PENDING_CLOCK, 1
.set PENDING_BLOCK, 2
.set PENDING_NETWORK, 4

.section .rodata.boot, "a"
ring0_message: .ascii "ledger: fatal: exception in ring 0 or while reporting one\n"
ring0_message_end:

.section .text.boot, "ax"
.global _start
_start:
    cli
    cld
    lea rsp, [rip + ring0_stack_top]

    // RSI points at the boot information. Keep it and the command line: the low 2 MiB are about to disappear.
    lea rdi, [rip + boot_information]
    mov ecx, 4
    rep movsq
    mov rsi, [rip + boot_information + 16]
    mov rcx, [rip + boot_information + 24]
    cmp rcx, COMMAND_LINE_SIZE
    jbe 1f
    mov ecx, COMMAND_LINE_SIZE
1:  lea rdi, [rip + boot_command_line]
    rep movsb

    // Our own page tables; SSE allowed in ring 3; no SMEP or SMAP: ring 0 and ring 3 share their pages.
    mov eax, 0x620              // PAE | OSFXSR | OSXMMEXCPT
    mov cr4, rax
    mov eax, 0x80010033         // PG | WP | NE | ET | MP | PE
    mov cr0, rax
    lea rax, [rip + page_map_level_4]
    mov cr3, rax

    // Descriptor of the task state segment, whose base is known only now. CS and SS stay: same selectors, same meaning.
    lea rax, [rip + task_state]
    lea rdi, [rip + descriptor_table]
    mov word ptr [rdi + TASK_STATE + 0], 103
    mov word ptr [rdi + TASK_STATE + 2], ax
    shr rax, 16
    mov byte ptr [rdi + TASK_STATE + 4], al
    mov byte ptr [rdi + TASK_STATE + 5], 0x89
    mov byte ptr [rdi + TASK_STATE + 7], ah
    lgdt [rip + descriptor_table_pointer]
    mov eax, TASK_STATE
    ltr ax

    // 48 interrupt gates, one to a 16-byte stub.
    lea rdi, [rip + interrupt_table]
    lea rax, [rip + vector_stubs]
    mov ecx, 48
2:  mov word ptr [rdi + 0], ax
    mov word ptr [rdi + 2], KERNEL_CODE
    mov word ptr [rdi + 4], 0x8E00
    mov rdx, rax
    shr rdx, 16
    mov word ptr [rdi + 6], dx
    add rdi, 16
    add rax, 16
    dec ecx
    jnz 2b
    lidt [rip + interrupt_table_pointer]

    // The 8259A pair: vectors 0x20 and 0x28, automatic end of interrupt, only lines 9, 10 and 11 open, those level triggered.
    mov al, 0x11
    out 0x20, al
    out 0xA0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xA1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xA1, al
    mov al, 3
    out 0x21, al
    out 0xA1, al
    mov al, 0xFB
    out 0x21, al
    mov al, 0xF1
    out 0xA1, al
    mov dx, 0x4D1
    mov al, 0x0E
    out dx, al

    mov eax, USER_DATA
    mov ds, eax
    mov es, eax
    push USER_DATA
    lea rax, [rip + __stack_top - 8]
    push rax
    push 0x202                  // IF
    push USER_CODE
    lea rax, [rip + ring3_main]
    push rax
    iretq

// A stub is 16 bytes, so that its address follows from its number. `.byte 0x6A, n` is `push n`.
.balign 16
vector_stubs:
.set vector, 0
.rept 48
    .balign 16
    .if vector == 6
        jmp undefined_opcode
    .elseif vector == 0x29
        jmp interrupt_clock
    .elseif vector == 0x2A
        jmp interrupt_block
    .elseif vector == 0x2B
        jmp interrupt_network
    .elseif vector >= 0x20
        iretq
    .elseif (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
        .byte 0x6A, vector
        jmp exception
    .else
        .byte 0x6A, 0
        .byte 0x6A, vector
        jmp exception
    .endif
    .set vector, vector + 1
.endr

// The lines are level triggered: each handler lowers its line with one register write, before IF comes back.
// Writing both InterruptACK bits without reading InterruptStatus saves an exit; ring 3 looks at the used rings anyway.
.balign 16
interrupt_clock:
    push rax
    mov eax, CLOCK_ALARM
    mov qword ptr [rax], 0
    or dword ptr [rip + pending], PENDING_CLOCK
    pop rax
    iretq

interrupt_block:
    push rax
    mov eax, BLOCK_INTERRUPT_ACK
    mov dword ptr [rax], 3
    or dword ptr [rip + pending], PENDING_BLOCK
    pop rax
    iretq

interrupt_network:
    push rax
    mov eax, NETWORK_INTERRUPT_ACK
    mov dword ptr [rax], 3
    or dword ptr [rip + pending], PENDING_NETWORK
    pop rax
    iretq

.balign 16
undefined_opcode:
    test byte ptr [rsp + 8], 3
    jz 1f
    cmp r10d, CALL_MAGIC
    jne 1f
    add qword ptr [rsp], 2
    test eax, eax
    jz call_wait
    cmp eax, 1
    je call_console
    jmp power_off
1:  .byte 0x6A, 0
    .byte 0x6A, 6
    jmp exception

// wait(edi = doorbells, rsi = alarm deadline or -1 for "as it is", edx = may halt) -> rax = now in ns, edx = what was pending
//
// With IF=0 from here to STI an interrupt cannot slip in between the look at `pending` and HLT; STI holds it off for one
// more instruction, so it ends the HLT.
call_wait:
    test edi, 1
    jz 1f
    mov ecx, BLOCK_QUEUE_NOTIFY
    mov dword ptr [rcx], 0
1:  test edi, 2
    jz 1f
    mov ecx, NETWORK_QUEUE_NOTIFY
    mov dword ptr [rcx], 0
1:  test edi, 4
    jz 1f
    mov ecx, NETWORK_QUEUE_NOTIFY
    mov dword ptr [rcx], 1
1:  cmp rsi, -1
    je 1f
    mov ecx, CLOCK_ALARM
    mov qword ptr [rcx], rsi
1:  test edx, edx
    jz 3f
2:  cmp dword ptr [rip + pending], 0
    jne 3f
    sti
    hlt
    cli
    jmp 2b
3:  mov edx, dword ptr [rip + pending]
    mov dword ptr [rip + pending], 0
    mov ecx, CLOCK_NOW
    mov rax, qword ptr [rcx]
    iretq

// console(rdi = bytes, rsi = length)
call_console:
    mov rcx, rsi
    mov rsi, rdi
    call write_console
    iretq

// rsi = bytes, rcx = length
write_console:
    mov edx, 0x3F8
1:  test rcx, rcx
    jz 2f
    lodsb
    out dx, al
    dec rcx
    jmp 1b
2:  ret

power_off:
    mov edx, 0x604
    mov eax, 0x2000
    out dx, ax
    mov al, 0xFE                // no ACPI there? then the keyboard controller's reset
    out 0x64, al
1:  cli
    hlt
    jmp 1b

// Stack: vector, error code, RIP, CS, RFLAGS, RSP, SS. Ring 3 reports its own faults, once, on a fresh stack.
exception:
    test byte ptr [rsp + 24], 3
    jz 1f
    cmp dword ptr [rip + exception_reported], 0
    jne 1f
    mov dword ptr [rip + exception_reported], 1
    mov rdi, [rsp]
    mov rsi, [rsp + 8]
    mov rdx, [rsp + 16]
    mov rcx, cr2
    and qword ptr [rsp + 32], ~0x400    // DF
    lea rax, [rip + ring3_exception]
    mov [rsp + 16], rax
    lea rax, [rip + __stack_top - 8]
    mov [rsp + 40], rax
    add rsp, 16
    iretq
1:  lea rsi, [rip + ring0_message]
    lea rcx, [rip + ring0_message_end]
    sub rcx, rsi
    cld
    call write_console
    jmp power_off

.section .data.boot, "aw"
.balign 16
descriptor_table:
    .quad 0
    .quad 0
    .quad 0x00AF9B000000FFFF    // 0x10 ring-0 code
    .quad 0x00CF93000000FFFF    // 0x18 ring-0 data
    .quad 0
    .quad 0x00CFF3000000FFFF    // 0x28 ring-3 data
    .quad 0x00AFFB000000FFFF    // 0x30 ring-3 code
    .quad 0
    .quad 0, 0                  // 0x40 task state segment
descriptor_table_end:
.balign 8
descriptor_table_pointer:
    .word descriptor_table_end - descriptor_table - 1
    .quad descriptor_table
.balign 8
interrupt_table_pointer:
    .word 48 * 16 - 1
    .quad interrupt_table
.balign 16
task_state:
    .long 0
    .quad ring0_stack_top
    .fill 90, 1, 0
    .word 104                   // no I/O permission bitmap: ring 3 has no ports

// Identity map: 2..16 MiB of RAM and the 2 MiB of device registers at 0xD0000000, all open to ring 3. Accessed and dirty
// bits are set beforehand, so that no page walk ever writes to a table.
.balign 4096
page_map_level_4:
    .quad page_directory_pointers + 0x67
    .fill 511, 8, 0
page_directory_pointers:
    .quad page_directory_ram + 0x67
    .quad 0, 0
    .quad page_directory_registers + 0x67
    .fill 508, 8, 0
page_directory_ram:
    .quad 0
    .set page, 1
    .rept 7
        .quad page * 0x200000 + 0xE7
        .set page, page + 1
    .endr
    .fill 504, 8, 0
page_directory_registers:
    .fill 128, 8, 0
    .quad 0xD0000000 + 0xF7     // with PCD: uncached, should anyone care
    .fill 383, 8, 0

.section .bss.boot, "aw", @nobits
.balign 16
interrupt_table: .skip 48 * 16
ring0_stack: .skip 4096
ring0_stack_top:
.global boot_information
.balign 8
boot_information: .skip 32
.global boot_command_line
boot_command_line: .skip COMMAND_LINE_SIZE
.balign 4
pending: .skip 4
exception_reported: .skip 4
.text
